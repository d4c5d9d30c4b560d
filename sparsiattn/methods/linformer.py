"""Linformer: keys and values are projected along the token axis to a fixed number.

Linformer: Self-Attention with Linear Complexity, arXiv 2006.04768.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsiattn import AttentionInputs, Pattern, Site, Strategy, count_of
from sparsiattn.methods._computed import MixedKeysPlanner, host_bias
from sparsiattn.methods._grid import Grid, resized
from sparsiattn.methods._weights import frozen


@dataclass(frozen=True)
class Linformer(Strategy):
    """Queries attend to ``E^T K`` and ``F^T V``, r computed keys (section 4, eq. 7).

    E and F start as average pooling over cells of the token grid. Entries of E are small, so
    `calibrate` needs a small ``lr`` (3e-4).

    Args:
        k: Number of computed keys, as a share of all keys or a count; the budget includes the
            prefix keys.
        shared: Whether E and F are one table (the paper's key-value sharing).
        mass: Whether to add a learned bias to each computed key's logit that starts as the log of
            its number of tokens; without it, untrained attention favours prefix keys.

    >>> Linformer(k=0.25).to_dict()["options"]["shared"]
    False
    """

    name = "linformer"
    paper = "https://arxiv.org/abs/2006.04768"
    fidelity = (
        "as published, except that prefix tokens keep their own keys and dense rows, E and F start "
        "as average pooling, and logits include log sizes (unless mass=False)"
    )
    needs_training = True
    selects_keys = False

    k: float = 0.25
    shared: bool = False
    mass: bool = True

    def planner(self, site: Site) -> LinformerPlanner:
        return LinformerPlanner(self, site)


class LinformerPlanner(MixedKeysPlanner):
    """The projections of one site, shared by its heads.

    Attributes:
        e: ``[P + n, r]``, projection of keys.
        f: ``[P + n, r]``, projection of values; None if shared.
        mass: Bias of the computed keys ``[r]``; None without.
    """

    def __init__(self, strategy: Linformer, site: Site) -> None:
        super().__init__(strategy, site)
        self.prefix, self.grid = site.prefix_tokens, site.key_grid
        budget = max(1, count_of(strategy.budget_for(site.keys), site.keys) - self.prefix_keys)
        membership = cell_membership(self.grid, cells_of(self.grid, budget))
        sizes = membership.sum(0)
        pooling = F.pad(membership / sizes, (0, 0, self.prefix, 0))
        self.e = frozen(pooling.clone())
        self.f = None if strategy.shared else frozen(pooling.clone())
        self.mass = frozen(sizes.log()) if strategy.mass else None

    def forward(self, inputs: AttentionInputs) -> Pattern:
        self.refuse_mask(inputs.site, inputs.allowed() is not None)
        e, remaining = self._present(self.e, inputs)
        f = e if self.f is None else self._present(self.f, inputs)[0]
        k, v = (table.mT.to(x.dtype) @ x for table, x in ((e, inputs.k), (f, inputs.v)))
        return self.pattern(inputs, k, v, self._bias(inputs, e, remaining))

    def _present(self, table: Tensor, inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
        """A table's rows for the remaining tokens, and the share of every cell that remains.

        Rows are ``[B, 1, N, r]`` or ``[N, r]``, scaled so that the sums of columns are unchanged.
        """
        grid = inputs.image_grid
        ratio = self.grid[0] * self.grid[1] / (grid[0] * grid[1])
        full = resized(table, self.grid, grid, self.prefix)
        rows = inputs.gather_rows(full)
        rows = rows.unsqueeze(1) if rows.dim() == 3 else rows
        weight = rows.abs().sum(-2, keepdim=True)
        remaining = weight / full.abs().sum(-2).clamp_min(1e-6)
        before = table.abs().sum(-2)
        return rows * (before / weight.clamp_min(1e-6)), remaining / ratio

    def _bias(self, inputs: AttentionInputs, e: Tensor, remaining: Tensor) -> Tensor | None:
        """Bias of the computed keys: their mass, and the weighted mean of the host's bias."""
        host = host_bias(inputs)
        if self.mass is None and host is None:
            return None
        bias = e.new_zeros(e.shape[-1]) if self.mass is None else self.mass + remaining.log()
        bias = bias.expand(1, 1, 1, -1) if bias.dim() < 4 else bias
        if host is None:
            return bias
        share = e.abs() / e.abs().sum(-2, keepdim=True).clamp_min(1e-6)
        return bias + host @ share.to(host.dtype)


def cells_of(grid: Grid, most: int) -> Grid:
    """The largest grid of at most ``most`` cells of about the same shape as ``grid``."""
    cells = [(rows, min(grid[1], most // rows)) for rows in range(1, min(grid[0], most) + 1)]
    aspect = grid[0] / grid[1]
    return max(cells, key=lambda c: (c[0] * c[1]) - abs(math.log(c[0] / c[1] / aspect)) * most / 4)


def cell_membership(grid: Grid, cells: Grid) -> Tensor:
    """One-hot cell of each token, ``[n, c]``, for a grid divided into nearly equal rectangles."""
    row, column = (
        torch.arange(size) * parts // size for size, parts in zip(grid, cells, strict=True)
    )
    return F.one_hot((row[:, None] * cells[1] + column).flatten(), cells[0] * cells[1]).float()
