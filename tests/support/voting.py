"""Calls whose tiles vote for their keys, and what their lists must hold."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsiattn.attention.background import key_cells
from sparsiattn.attention.geometry import Grid
from sparsiattn.attention.top_logits import TopLogits
from sparsiattn.kernels import triton_plan
from sparsiattn.testing import random_inputs


@dataclass(frozen=True)
class VotingCase:
    """One call whose tiles vote for their keys."""

    grid: Grid = (8, 8)
    tile: tuple[int, int] = (4, 4)
    k: int = 20
    prefix: int = 1
    dim: int = 16
    batch: int = 1
    heads: int = 2
    background: int | None = 2
    dtype: torch.dtype = torch.float32

    @property
    def parts(self) -> Grid | None:
        """Rows and columns of the summary's cells."""
        g = self.background
        if g is None:
            return None
        return (1, g * g) if self.grid[0] == 1 else (g, g)

    def pattern(self, device: str = "cpu") -> TopLogits:
        inputs = random_inputs(
            self.grid, batch=self.batch, heads=self.heads, dim=self.dim, prefix=self.prefix,
            tile=self.tile, dtype=self.dtype,
        )  # fmt: skip
        q, k, v = (x.to(device) for x in (inputs.q * 3, inputs.k, inputs.v))
        return TopLogits.of(inputs.replace(q=q, k=k, v=v), self.k)

    def lists(self, pattern: TopLogits) -> tuple[Tensor, Tensor | None]:
        """The lists and the bias of the summary that the kernels find."""
        return triton_plan.voted_lists(pattern, self.k, self.parts)


def assert_largest_votes(
    case: VotingCase, pattern: TopLogits, index: Tensor, bias: Tensor | None
) -> None:
    """Lists hold the best keys, but for votes that differ from the smallest by rounding only."""
    votes = _votes_of(pattern)
    least = votes.topk(case.k, dim=-1).values[..., -1:]
    chosen = votes.gather(-1, index)
    assert index.shape == (*votes.shape[:-1], case.k)
    assert (index.diff(dim=-1) > 0).all()
    assert (chosen >= least * (1 - 1e-4)).all()
    certain = (votes > least * (1 + 1e-4)).sum(-1)
    assert torch.equal((chosen > least * (1 + 1e-4)).sum(-1), certain)
    if case.parts is None:
        assert bias is None
        return
    assert bias is not None
    cells = key_cells(case.grid, case.parts, case.prefix, device=index.device)
    member = torch.nn.functional.one_hot(cells).float()[:, : bias.shape[-1]]
    left = member.sum(0) - member[index].sum(-2)
    torch.testing.assert_close(bias, left.log(), rtol=1e-5, atol=1e-5)


def _votes_of(pattern: TopLogits) -> Tensor:
    """The votes in float64, with prefix keys above all others."""
    inputs = pattern.inputs
    exact = inputs.replace(q=inputs.q.double(), k=inputs.k.double())
    votes = TopLogits.of(exact, pattern.k).ranked().scores
    votes[..., : inputs.prefix] = float("inf")
    return votes
