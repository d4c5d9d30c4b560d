"""Attention scores of an earlier block used again, after LaViT."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from sparsiattn import (
    AttentionInputs,
    InvalidOption,
    LearnedPlanner,
    Pattern,
    Planner,
    Site,
    Strategy,
)

from . import _tables as tables

LOGITS = "logits"


@dataclass(frozen=True)
class AttentionReuse(Strategy):
    """Layers without QK^T: ``A_l = Psi(Theta(A_{l-1})^T)^T``, then ``softmax(A_l) V``.

    layers: indices of the sites that use the scores of the site before them again, every second one
    if None. rank: of ``Theta = I + U V^T`` and ``Psi``, which start as the identity; ``"full"`` for
    ``N x N`` tables as in the paper (a loss in MACs beyond small N); None for the identity alone,
    which learns nothing. A site that finds no scores of its own shape (the first of a stage, fewer
    tokens) makes its own.

    >>> AttentionReuse(layers=[1, 3]).to_dict()["options"]["layers"]
    [1, 3]
    """

    name = "attention_reuse"
    paper = "https://arxiv.org/abs/2406.00427"
    fidelity = (
        "inspired by: the host still makes the queries and keys of layers that do not use them, "
        "stages are not joined by a residual of scores, and its diagonality loss is left out; "
        "Theta and Psi start as the identity, low-rank by choice"
    )
    exact_at_full = False
    inexact_reason = "there is no budget: the listed layers never make their own scores"
    selects_keys = False
    uses_cross_layer_state = True

    layers: tuple[int, ...] | list[int] | None = None
    rank: int | str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "layers", tables.layer_indices(self.name, self.layers))
        if self.rank not in (None, "full") and (type(self.rank) is not int or self.rank < 1):
            raise InvalidOption(f"rank must be None, 'full' or an int >= 1, got {self.rank!r}")

    def planner(self, site: Site) -> Planner:
        layers = tuple(self.layers or range(1, site.depth, 2))
        tables.check_depth(self.name, layers, site)
        role = Role(site.index in layers, site.index + 1 in layers)
        if self.rank is None or not (role.reads or role.keeps):
            return role
        return ReusePlanner(role, self.rank, site)


@dataclass(frozen=True)
class Role:
    """A planner with Theta and Psi the identity. reads: whether it uses earlier scores; keeps:
    whether the next site will use its own."""

    reads: bool
    keeps: bool

    def __call__(self, inputs: AttentionInputs, /) -> Pattern:
        return self.plan(inputs, None)

    def plan(self, inputs: AttentionInputs, change: ReusePlanner | None) -> Pattern:
        logits = self.reused(inputs)
        if logits is None and not self.keeps:
            return Pattern.dense(inputs.n_queries, inputs.n_keys)
        if logits is None:
            logits = own_scores(inputs)
        elif change is not None:
            logits = change.transform(logits, inputs)
        if self.keeps:
            inputs.store(LOGITS, logits)
        return Pattern.logits(inputs, logits)

    def reused(self, inputs: AttentionInputs) -> Tensor | None:
        """The scores of the site before, ``[B, H, Nq, Nk]``, if they are to be used and fit."""
        shape = (*inputs.q.shape[:3], inputs.n_keys)
        return inputs.load(LOGITS, shape) if self.reads else None


class ReusePlanner(LearnedPlanner):
    """Theta and Psi of one site, less the identity and shared by its heads: ``[P + n, r]`` twice
    each, or ``[P + n, P + n]``; a site that only leaves its scores has none."""

    differentiable = True

    def __init__(self, role: Role, rank: int | str, site: Site) -> None:
        super().__init__()
        self.role, self.prefix = role, site.prefix_tokens
        self.grids = {"theta": site.grid, "psi": site.key_grid}
        draw = torch.Generator().manual_seed(site.index)
        for name, grid in self.grids.items() if role.reads else ():
            size = site.prefix_tokens + grid[0] * grid[1]
            width = size if rank == "full" else min(cast(int, rank), size)
            left = torch.zeros(size, width)
            setattr(self, name, nn.Parameter(left, requires_grad=False))
            if (
                rank != "full"
            ):  # one factor is zero, so that the other one gets no gradient at first
                right = torch.randn(size, width, generator=draw) / math.sqrt(size)
                setattr(self, f"{name}_in", nn.Parameter(right, requires_grad=False))

    def forward(self, inputs: AttentionInputs) -> Pattern:
        return self.role.plan(inputs, self)

    def transform(self, logits: Tensor, inputs: AttentionInputs) -> Tensor:
        """``Theta A Psi^T``."""
        rows = self._change("theta", logits, inputs.query_grid)
        return self._change("psi", rows.mT, inputs.key_grid).mT

    def _change(self, name: str, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """``(I + T) x`` with T laid over the present grid."""
        old, first = self.grids[name], self.prefix
        out = tables.resized(getattr(self, name), old, grid, first)
        ratio = old[0] * old[1] / (grid[0] * grid[1])  # sums over more tokens, or fewer
        if hasattr(self, f"{name}_in"):
            into = tables.resized(getattr(self, f"{name}_in"), old, grid, first) * ratio
            return x + out.to(x.dtype) @ (into.mT.to(x.dtype) @ x)
        square = tables.resized(out.mT, old, grid, first).mT * ratio
        return x + square.to(x.dtype) @ x

    def loss(self, inputs: AttentionInputs) -> Tensor:
        """Divergence of reused attention from the site's own; zero where nothing is reused."""
        found, own = self.role.reused(inputs), own_scores(inputs).detach()
        if found is None:
            if self.role.keeps:
                inputs.store(LOGITS, own)
            return own.new_zeros(())
        changed = self.transform(found, inputs)
        if self.role.keeps:
            inputs.store(LOGITS, changed)
        ours = inputs.biased(changed.float()).log_softmax(-1).clamp_min(-1e4)
        exact = inputs.biased(own.float()).softmax(-1)
        apart: Tensor = torch.special.xlogy(exact, exact) - exact * ours
        return apart.sum(-1).mean()


def own_scores(inputs: AttentionInputs) -> Tensor:
    """Scaled QK^T without the host's bias, ``[B, H, Nq, Nk]``."""
    return inputs.replace(bias=None).logits()
