"""Expedit: later blocks of a dense prediction model run on soft superpixels, without training.

Expediting large vision transformers for dense prediction without fine-tuning (NeurIPS 2022, arXiv
2210.01035): a clustering layer, and a reconstruction layer at the end.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsiattn import InvalidOption, Reduction, TokenInputs
from sparsiattn.methods._grid import Grid, grid_pairs, middles
from sparsiattn.methods._options import check_count, check_number
from sparsiattn.methods._tokens import full_precision, precise
from sparsiattn.methods.clusters import Clustering, squared_distances


@dataclass(frozen=True)
class Expedit(Clustering):
    """Runs the later blocks on a coarse grid of soft superpixels, and reconstructs every position
    from its most similar superpixels.

    Args:
        keep: Share or count of the patch tokens. Both sides of the image's grid are multiplied by
            the square root of the share and rounded to get the grid of superpixels.
        cells: Rows and columns of superpixels, instead of ``keep``.
        iterations: Number of updates of the soft assignment.
        radius: Number of superpixels in each direction that a token may belong to.
        neighbours: Number of superpixels that a position is reconstructed from.
        temperature: Temperature of the assignment and the reconstruction; weights are
            ``exp(- temperature x squared distance)``.
        layers: The block at whose entry tokens are clustered; None for five twelfths of the depth.

    >>> Expedit(keep=0.49).grid_of(40, 40), Expedit(keep=0.49).layers_in(24)
    ((28, 28), (10,))
    """

    name = "expedit"
    suite = MappingProxyType({"ordered": True})  # it depends on positions in the image
    paper = "https://arxiv.org/abs/2210.01035"
    fidelity = (
        "as published; reconstruction is after the last block (the paper's default), and its "
        "weights sum to one as in the paper, while the published code scales them to unit length"
    )
    needs_grid = True
    place = "entry"

    keep: int | float = 0.49
    cells: Grid | None = None
    iterations: int = 5
    radius: int = 2
    neighbours: int = 20
    temperature: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.cells, list):
            object.__setattr__(self, "cells", tuple(self.cells))
        if self.cells is not None and not (isinstance(self.cells, tuple) and len(self.cells) == 2):
            raise InvalidOption(f"cells must be (rows, columns) or None, got {self.cells!r}")
        for side in self.cells or ():
            check_count("cells", side)
        for name in ("iterations", "radius", "neighbours"):
            check_count(name, getattr(self, name))
        check_number("temperature", self.temperature, 0, 1e18, above=True)
        if self.restore == "scatter":
            raise InvalidOption(
                "expedit's superpixels do not correspond to single patches, so restore='scatter' "
                "is not possible; use 'auto', 'unfold' or None"
            )
        if self.layers is not None and len(self.layers) != 1:
            raise InvalidOption(
                "expedit clusters the complete grid of tokens once: layers must contain one block "
                f"index, got {list(self.layers)}"
            )

    def default_layers(self, depth: int) -> tuple[int, ...]:
        return (depth * 5 // 12,)

    def grid_of(self, rows: int, columns: int) -> Grid:
        """Rows and columns of superpixels for an image with these rows and columns of patches."""
        if self.cells is not None:
            return min(self.cells[0], rows), min(self.cells[1], columns)
        keep = self.keep if isinstance(self.keep, float) else min(1.0, self.keep / (rows * columns))
        side = math.sqrt(keep)
        return max(1, round(rows * side)), max(1, round(columns * side))

    def reduce(self, tokens: TokenInputs) -> Reduction | None:
        if tokens.ids is not None:
            raise InvalidOption(
                "expedit needs the complete grid of tokens, but some were merged before: use it "
                "without other reductions before its layer"
            )
        cells = self.grid_of(*tokens.grid)
        return None if cells == tokens.grid else self.superpixels(tokens, cells)

    def superpixels(self, tokens: TokenInputs, cells: Grid) -> Reduction:
        """The reduction to a grid of superpixels with ``cells`` rows and columns."""
        x, device = precise(tokens.x), tokens.x.device
        near = adjacent(tokens.grid, cells, self.radius, device=device)
        image = x.mT.unflatten(2, tokens.grid)
        start = F.adaptive_avg_pool2d(image, cells).flatten(2).mT
        affinity = soft_assignment(x, start, near, self.iterations, self.temperature)
        values = weighted_means(affinity, tokens.x)
        centroids = precise(values)
        row, column = (
            middles(patches, parts, device=device)
            for patches, parts in zip(tokens.grid, cells, strict=True)
        )
        index = (row[:, None] * tokens.grid[1] + column).reshape(1, -1)
        return Reduction.cluster(
            index.expand(x.shape[0], -1),  # len() would fix the batch size of an export
            squared_distances(x, centroids).argmin(2),
            values=values,
            unfold=partial(
                reconstruct, x, centroids, min(self.neighbours, len(near)), self.temperature
            ),
        )


def adjacent(grid: Grid, cells: Grid, radius: int, *, device: torch.device) -> Tensor:
    """The superpixels that each patch may belong to: those near the superpixel that contains it.

    Args:
        grid: Rows and columns of patches.
        cells: Rows and columns of superpixels.
        radius: Largest distance of a superpixel in rows and columns.
        device: Device of the result.

    Returns:
        Boolean ``[m, n]``.
    """
    sides = []
    for patches, parts in zip(grid, cells, strict=True):
        home = torch.arange(patches, device=device) * parts // patches
        distance = torch.arange(parts, device=device)[:, None] - home
        sides.append(distance.abs() <= radius)
    return grid_pairs(*sides)


def soft_assignment(
    x: Tensor, centroids: Tensor, near: Tensor, iterations: int, temperature: float
) -> Tensor:
    """Soft assignment of tokens to superpixels (eq. 2 of the paper).

    Args:
        x: Tokens ``[B, n, C]``.
        centroids: Initial centroids ``[B, m, C]``.
        near: Boolean ``[m, n]``, the superpixels that a token may belong to.
        iterations: Number of assignments; centroids are updated between them.
        temperature: Factor of squared distances.

    Returns:
        ``[B, m, n]``, which sums to one over superpixels.
    """
    affinity = x.new_empty(0)
    for step in range(iterations):
        if step:
            centroids = weighted_means(affinity, x)
        distances = squared_distances(centroids, x)
        affinity = (-temperature * distances).masked_fill(~near, float("-inf")).softmax(1)
    return affinity


def weighted_means(affinity: Tensor, x: Tensor) -> Tensor:
    """Centroids ``[B, m, C]`` of ``x`` ``[B, n, C]`` with weights ``[B, m, n]``."""
    shares = affinity / affinity.sum(2, keepdim=True).clamp_min(1e-16)
    with full_precision(x):
        return (shares @ x.to(shares.dtype)).to(x.dtype)


def reconstruct(
    before: Tensor, centroids: Tensor, neighbours: int, temperature: float, x: Tensor
) -> Tensor:
    """Reconstruct every position as a weighted mean of superpixels (eq. 4 of the paper).

    Args:
        before: Tokens ``[B, n, C]`` at the time of clustering.
        centroids: Centroids ``[B, m, C]`` of the superpixels at that time.
        neighbours: Number of superpixels per position, the nearest ones by ``before``.
        temperature: Weights are ``exp(-temperature x squared distance)``.
        x: Values ``[B, m, C]`` of the superpixels after the last block.

    Returns:
        ``[B, n, C]``.
    """
    distances = squared_distances(before, centroids)
    nearest = distances.topk(neighbours, dim=2, largest=False)
    weights = (-temperature * nearest.values).softmax(2)
    spread = torch.zeros_like(distances).scatter(2, nearest.indices, weights)
    return spread.to(x.dtype) @ x
