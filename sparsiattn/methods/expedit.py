"""Expediting large vision transformers for dense prediction without fine-tuning (NeurIPS 2022,
arXiv 2210.01035): a clustering layer, and a reconstruction layer at the end."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsiattn import InvalidOption, Reduction, TokenInputs
from sparsiattn.methods.clusters import (
    Clustering,
    check_count,
    full_precision,
    precise,
    squared_distances,
)


@dataclass(frozen=True)
class Expedit(Clustering):
    """Runs the later blocks on a coarse grid of soft superpixels and reconstructs every position
    from the superpixels that it was most alike.

    keep: share (or count) of the patch tokens; the grid of superpixels is the image's, both sides
    times the root of it, rounded. cells: rows and columns of superpixels, instead of ``keep``.
    iterations: of the soft assignment. radius: superpixels to each side to which a token may
    belong. neighbours: superpixels that a position is reconstructed from. temperature: of both the
    assignment and the reconstruction; weights are ``exp(- temperature x squared distance)``.
    layers: the one block at whose entry tokens are clustered; at five twelfths of the depth where
    None.

    >>> Expedit(keep=0.49).grid_of(40, 40), Expedit(keep=0.49).layers_in(24)
    ((28, 28), (10,))
    """

    name = "expedit"
    suite = MappingProxyType({"ordered": True})  # what is near in the image decides
    paper = "https://arxiv.org/abs/2210.01035"
    fidelity = (
        "as published; the reconstruction comes after the last block (the paper's default) and its "
        "weights sum to one as in the paper, where the published code scales them to unit length"
    )
    place = "entry"

    keep: int | float = 0.49
    cells: tuple[int, int] | None = None
    iterations: int = 5
    radius: int = 2
    neighbours: int = 20
    temperature: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.cells, list):
            object.__setattr__(self, "cells", tuple(self.cells))
        for side in () if self.cells is None else _pair(self.cells):
            check_count("cells", side)
        for name in ("iterations", "radius", "neighbours"):
            check_count(name, getattr(self, name))
        if not (isinstance(self.temperature, (int, float)) and 0 < self.temperature < 1e18):
            raise InvalidOption(f"temperature must be a number > 0, got {self.temperature!r}")
        if self.restore == "scatter":
            raise InvalidOption(
                "expedit's superpixels stand for no patch in particular, so restore='scatter' has "
                "nothing to put back; use 'auto', 'unfold' or None"
            )
        if self.layers is not None and len(self.layers) != 1:
            raise InvalidOption(
                "expedit clusters a whole grid of tokens, so only once: layers must hold one block "
                f"index, got {list(self.layers)}"
            )

    def default_layers(self, depth: int) -> tuple[int, ...]:
        return (depth * 5 // 12,)

    def grid_of(self, rows: int, columns: int) -> tuple[int, int]:
        """Rows and columns of superpixels for an image of so many patches."""
        if self.cells is not None:
            return min(self.cells[0], rows), min(self.cells[1], columns)
        keep = self.keep
        side = math.sqrt(keep if isinstance(keep, float) else min(1.0, keep / (rows * columns)))
        return max(1, round(rows * side)), max(1, round(columns * side))

    def reduce(self, tokens: TokenInputs) -> Reduction | None:
        if tokens.ids is not None:
            raise InvalidOption("expedit needs the whole grid of tokens; some were merged before")
        cells = self.grid_of(*tokens.grid)
        return None if cells == tokens.grid else self.superpixels(tokens, cells)

    def superpixels(self, tokens: TokenInputs, cells: tuple[int, int]) -> Reduction:
        """The reduction to a grid of ``cells``."""
        x, near = precise(tokens.x), adjacent(tokens.grid, cells, self.radius, tokens.x.device)
        affinity = soft_assignment(x, tokens.grid, cells, near, self.iterations, self.temperature)
        values = weighted_means(affinity, tokens.x)
        centroids = precise(values)
        assign = squared_distances(x, centroids).argmin(2)
        index = middles(tokens.grid, cells, tokens.x.device).expand(
            x.shape[0], -1
        )  # len() would tie an export to this batch
        count = min(self.neighbours, index.shape[1])
        unfold = partial(reconstruct, x, centroids, count, self.temperature)
        return Reduction.cluster(index, assign, values=values, unfold=unfold)


def adjacent(
    grid: tuple[int, int], cells: tuple[int, int], radius: int, device: torch.device
) -> Tensor:
    """Boolean ``[m, n]``: the superpixels to which a patch may belong, those at most ``radius``
    rows and columns from the one it lies in."""
    sides = []
    for patches, parts in zip(grid, cells, strict=True):
        home = torch.arange(patches, device=device) * parts // patches
        apart = torch.arange(parts, device=device)[:, None] - home
        sides.append(apart.abs() <= radius)
    near = sides[0][:, None, :, None] & sides[1][None, :, None, :]
    return near.reshape(cells[0] * cells[1], grid[0] * grid[1])


def soft_assignment(
    x: Tensor, grid: tuple[int, int], cells: tuple[int, int], near: Tensor,
    iterations: int, temperature: float,
) -> Tensor:  # fmt: skip
    """``[B, m, n]``: how much every token of ``x`` ``[B, n, C]`` belongs to each superpixel, after
    so many updates of their centroids; sums to one over superpixels (the paper's eq. 2)."""
    image = x.mT.unflatten(2, grid)
    centroids = F.adaptive_avg_pool2d(image, cells).flatten(2).mT
    affinity = x.new_empty(0)
    for step in range(iterations):
        if step:
            centroids = weighted_means(affinity, x)
        distances = squared_distances(centroids, x)
        affinity = (-temperature * distances).masked_fill(~near, float("-inf")).softmax(1)
    return affinity


def weighted_means(affinity: Tensor, x: Tensor) -> Tensor:
    """``[B, m, C]``: centroids of ``x`` ``[B, n, C]`` under weights ``[B, m, n]``."""
    shares = affinity / affinity.sum(2, keepdim=True).clamp_min(1e-16)
    with full_precision(x):
        return (shares @ x.to(shares.dtype)).to(x.dtype)


def reconstruct(
    before: Tensor, centroids: Tensor, neighbours: int, temperature: float, x: Tensor
) -> Tensor:
    """``[B, n, C]``: at every position the mean of the superpixels' values ``x`` ``[B, m, C]`` over
    the ``neighbours`` whose ``centroids`` ``[B, m, C]`` were nearest to the token ``before`` ``[B,
    n, C]``, weighted by ``exp(-temperature x squared distance)`` (the paper's eq. 4)."""
    distances = squared_distances(before, centroids)
    nearest = distances.topk(neighbours, dim=2, largest=False)
    weights = (-temperature * nearest.values).softmax(2)
    spread = torch.zeros_like(distances).scatter(2, nearest.indices, weights)
    return spread.to(x.dtype) @ x


def middles(grid: tuple[int, int], cells: tuple[int, int], device: torch.device) -> Tensor:
    """``[1, m]``: the number of the patch in the middle of every superpixel's cell."""
    row, column = (
        (2 * torch.arange(parts, device=device) + 1) * patches // (2 * parts)
        for patches, parts in zip(grid, cells, strict=True)
    )
    return (row[:, None] * grid[1] + column).reshape(1, -1)


def _pair(cells: object) -> tuple[object, ...]:
    if not isinstance(cells, tuple) or len(cells) != 2:
        raise InvalidOption(f"cells must be (rows, columns) or None, got {cells!r}")
    return cells
