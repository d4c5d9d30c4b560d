"""Attention reuse: a layer uses the scores of the previous layer instead of computing its own.

After LaViT, arXiv 2406.00427.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from sparsiattn import AttentionInputs, InvalidOption, LearnedPlanner, Pattern, Planner, Site
from sparsiattn.methods._computed import ReusingStrategy, Role
from sparsiattn.methods._grid import Grid, resized
from sparsiattn.methods._weights import frozen


@dataclass(frozen=True)
class AttentionReuse(ReusingStrategy):
    """Layers without QK^T: ``A_l = Psi(Theta(A_{l-1})^T)^T``, then ``softmax(A_l) V``.

    A site without earlier scores of its own shape (the first of a stage, or after a reduction of
    tokens) computes its own scores.

    Args:
        layers: Indices of the sites that reuse the scores of the previous site; None for every
            second site.
        rank: Rank of ``Theta = I + U V^T`` and of ``Psi``, which start as the identity; ``"full"``
            for ``N x N`` tables as in the paper (more MACs than it saves unless N is small); None
            for the identity, without learning.

    >>> AttentionReuse(layers=[1, 3]).to_dict()["options"]["layers"]
    [1, 3]
    """

    name = "attention_reuse"
    paper = "https://arxiv.org/abs/2406.00427"
    fidelity = (
        "inspired by: the model still computes queries and keys in layers that do not use them, "
        "stages have no residual connection of scores, and the diagonality loss is left out; Theta "
        "and Psi start as the identity, optionally low-rank"
    )
    inexact_reason = "there is no budget: the listed layers never compute their own scores"

    rank: int | str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank not in (None, "full") and (type(self.rank) is not int or self.rank < 1):
            raise InvalidOption(f"rank must be None, 'full' or an int >= 1, got {self.rank!r}")

    def default_layers(self, depth: int) -> Sequence[int]:
        return range(1, depth, 2)

    def planner(self, site: Site) -> Planner:
        role = ScoreRole(*self.reads_and_writes(site))
        if self.rank is None or not (role.reads or role.writes):
            return role
        return ReusePlanner(role, self.rank, site)


@dataclass(frozen=True)
class ScoreRole(Role):
    """A planner with the identity as Theta and Psi."""

    tensor_name = "logits"

    def __call__(self, inputs: AttentionInputs, /) -> Pattern:
        return self.pattern(inputs, lambda logits, inputs: logits)

    def pattern(
        self, inputs: AttentionInputs, transform: Callable[[Tensor, AttentionInputs], Tensor]
    ) -> Pattern:
        """Attention with the transformed earlier scores, or with the site's own scores."""
        earlier = self.load(inputs, inputs.n_keys)
        if earlier is None and not self.writes:
            return super().__call__(inputs)
        logits = own_logits(inputs) if earlier is None else transform(earlier, inputs)
        self.store(inputs, logits)
        return Pattern.logits(inputs, logits)


class ReusePlanner(LearnedPlanner):
    """Theta and Psi of one site without the identity, shared by its heads.

    A site that only stores its scores has none.

    Attributes:
        theta: ``[P + n, r]``, or ``[P + n, P + n]`` with full rank.
        theta_in: ``[P + n, r]``; absent with full rank.
        psi: As ``theta``.
        psi_in: As ``theta_in``.
    """

    differentiable = True

    def __init__(self, role: ScoreRole, rank: int | str, site: Site) -> None:
        super().__init__()
        self.role, self.prefix = role, site.prefix_tokens
        self.grids = {"theta": site.grid, "psi": site.key_grid}
        random = torch.Generator().manual_seed(site.index)
        for name, grid in self.grids.items() if role.reads else ():
            size = site.prefix_tokens + grid[0] * grid[1]
            width = size if rank == "full" else min(cast(int, rank), size)
            setattr(self, name, frozen(torch.zeros(size, width)))
            if rank != "full":
                # only one factor is zero, otherwise neither would get a gradient
                factor = torch.randn(size, width, generator=random) / math.sqrt(size)
                setattr(self, f"{name}_in", frozen(factor))

    def forward(self, inputs: AttentionInputs) -> Pattern:
        return self.role.pattern(inputs, self.transform)

    def transform(self, logits: Tensor, inputs: AttentionInputs) -> Tensor:
        """``Theta A Psi^T``."""
        rows = self._mix_rows("theta", logits, inputs.query_grid)
        return self._mix_rows("psi", rows.mT, inputs.key_grid).mT

    def _mix_rows(self, name: str, x: Tensor, grid: Grid) -> Tensor:
        """``(I + T) x`` with T resized to the current grid."""
        old, prefix = self.grids[name], self.prefix
        out = resized(getattr(self, name), old, grid, prefix)
        ratio = old[0] * old[1] / (grid[0] * grid[1])  # the sum is over another number of tokens
        if hasattr(self, f"{name}_in"):
            into = resized(getattr(self, f"{name}_in"), old, grid, prefix) * ratio
            return x + out.to(x.dtype) @ (into.mT.to(x.dtype) @ x)
        square = resized(out.mT, old, grid, prefix).mT * ratio
        return x + square.to(x.dtype) @ x

    def loss(self, inputs: AttentionInputs) -> Tensor:
        """KL divergence of reused attention from the site's own; zero if nothing is reused."""
        earlier, exact_logits = self.role.load(inputs, inputs.n_keys), own_logits(inputs).detach()
        reused = exact_logits if earlier is None else self.transform(earlier, inputs)
        self.role.store(inputs, reused)
        if earlier is None:
            return exact_logits.new_zeros(())
        log_reused = inputs.biased(reused.float()).log_softmax(-1).clamp_min(-1e4)
        exact = inputs.biased(exact_logits.float()).softmax(-1)
        divergence: Tensor = torch.special.xlogy(exact, exact) - exact * log_reused
        return divergence.sum(-1).mean()


def own_logits(inputs: AttentionInputs) -> Tensor:
    """Scaled QK^T without the host's bias, ``[B, H, Nq, Nk]``."""
    return inputs.replace(bias=None).logits()
