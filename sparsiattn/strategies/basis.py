"""The weights of `connectivity`: tables over the token grid, channel maps, and initial values."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsiattn.attention import geometry
from sparsiattn.attention.auto_options import TILE_FROM
from sparsiattn.attention.geometry import Grid, Tile, Tiles

MapPair = tuple[nn.Linear, nn.Linear]
MOST_BASIS = 1024
"""Cells of the default basis: tables grow with the product of tokens and cells."""


def pooled_by_block(x: Tensor, blocks: Tiles, prefix: int, *, total: bool = False) -> Tensor:
    """Prefix rows unchanged, then one row per block: the mean (or the sum) over its tokens."""
    rows = blocks.mean(x[..., prefix:, :])
    if total:
        sizes = (blocks.weight > 0).sum(-1, keepdim=True)
        rows = rows * sizes.to(rows.dtype)
    return torch.cat([x[..., :prefix, :], rows], dim=-2) if prefix else rows


def unit_grid(grid: Grid, block: Tile, views: int = 1) -> Grid:
    """The grid of the units that are chosen: patch keys, or blocks of them."""
    return grid if isinstance(block, int) else geometry.tile_parts(grid, block, views)


def own_keys(rows: int, keys: int, prefix: int, *, device: torch.device) -> Tensor:
    """``[rows, keys]``, True where a row's query and the key are the same token.

    >>> own_keys(2, 3, 1, device=torch.device("cpu")).int().tolist()
    [[0, 1, 0], [0, 0, 1]]
    """
    places = torch.arange(keys, device=device) - prefix
    return places == torch.arange(rows, device=device)[:, None]


def padded_shares(before: int, dtype: torch.dtype, *sizes: Any, device: torch.device) -> Tensor:
    """`geometry.own_shares` after ``before`` columns of zeros, which stand for prefix keys."""
    shares = geometry.own_shares(*sizes, device=device)
    return F.pad(shares, (before, 0)).to(dtype)


def basis_cells(grid: Grid, tokens_per_basis: float | None, basis: int | None) -> Grid:
    """Rows and columns of the cells whose means are the initial basis.

    Args:
        grid: Rows and columns of patch tokens.
        tokens_per_basis: Tokens in a cell. None is 6 below 1,024 tokens and 16 from there on, or
            more if there would be more than `MOST_BASIS` cells.
        basis: Largest number of cells, used instead of ``tokens_per_basis``.
    """
    n = grid[0] * grid[1]
    per_cell = tokens_per_basis or (6.0 if n < TILE_FROM else max(16.0, n / MOST_BASIS))
    if basis:
        per_cell = max(1.0, n / basis)
    side = math.sqrt(per_cell)
    sizes = (1.0, grid[1] / per_cell) if grid[0] == 1 else (grid[0] / side, grid[1] / side)
    rows, columns = (max(1, math.floor(s) if basis else math.ceil(s)) for s in sizes)
    return rows, columns


def initial_tables(
    grid: Grid, prefix: int, cells: Grid, basis: int | None
) -> tuple[Tensor, Tensor]:
    """Average pooling and bilinear interpolation, ``[P + n, K]``; prefix rows are zero.

    Sites with the same grid share the result, which must not be written to.
    """
    cells = min(cells[0], grid[0]), min(cells[1], grid[1])
    key, cpu = (grid, prefix, cells, basis), torch.device("cpu")
    tables: tuple[Tensor, Tensor] = geometry.table(_initial_tables, *key, device=cpu)
    return tables


def _initial_tables(
    grid: Grid, prefix: int, cells: Grid, basis: int | None, *, device: torch.device
) -> tuple[Tensor, Tensor]:
    tables = []
    for build in (geometry.pooling, geometry.interpolation):
        table = build(grid, cells, device=device)
        if basis is not None:
            table = F.pad(table, (0, max(0, basis - table.shape[1])))[:, :basis]
        tables.append(F.pad(table, (0, 0, prefix, 0)).contiguous())
    return tables[0], tables[1]


def resize_table(table: Tensor, old: Grid, new: Grid, prefix: int) -> Tensor:
    """Bilinear interpolation of the patch rows of ``[P + n, K]`` to another grid.

    Prefix rows are unchanged.
    """
    image = table[prefix:].mT.reshape(1, -1, *old)
    resized = F.interpolate(image.float(), new, mode="bilinear", align_corners=False)
    return torch.cat([table[:prefix], resized[0].flatten(1).mT.to(table.dtype)])


def resize_tables(
    down: Tensor, up: Tensor, old: Grid, new: Grid, prefix: int
) -> tuple[Tensor, Tensor]:
    """W_down and W_up, ``[P + n, K]``, interpolated to another grid."""
    down, up = (resize_table(table, old, new, prefix) for table in (down, up))
    # pooling weights must sum to one over more (or fewer) tokens
    ratio = old[0] * old[1] / (new[0] * new[1])
    patches = torch.arange(down.shape[0], device=down.device)[:, None] >= prefix
    return torch.where(patches, down * ratio, down), up


def channel_maps(width: int, channels: int, generator: torch.Generator) -> MapPair:
    """Frozen linear maps of queries and of keys from ``width`` to ``channels``.

    Both are the same semi-orthogonal map, which preserves products as well as that many channels
    can, scaled to preserve their size.
    """
    weight = torch.empty(channels, width)
    nn.init.orthogonal_(weight, generator=generator)
    gain = max(1.0, math.sqrt(width / channels))
    maps = []
    for _ in range(2):
        # skip_init: the default initialisation would draw from the global random state
        linear = nn.utils.skip_init(nn.Linear, width, channels)
        linear.weight = nn.Parameter(weight * math.sqrt(gain), requires_grad=False)
        linear.bias = nn.Parameter(torch.zeros(channels), requires_grad=False)
        maps.append(linear)
    return maps[0], maps[1]


@torch.no_grad()
def fit_channel_maps(maps: MapPair, queries: Tensor, keys: Tensor, scale: float) -> None:
    """Set the maps to the best low-rank approximation of ``scale`` times the full products.

    It is the best one on average over queries ``[..., D]`` and basis keys ``[..., D]``: from the
    singular vectors of ``Cq^(1/2) Ck^(1/2)``, with second moments ``Cq`` and ``Ck``. The mean of
    the keys is subtracted first, because softmax is invariant to it.
    """
    query_root, query_inverse = _root(queries)
    key_root, key_inverse = _root(keys - keys.mean(-2, keepdim=True))
    u, s, vh = torch.linalg.svd(query_root @ key_root)
    sides = (query_inverse, u, scale), (key_inverse, vh.mT, 1.0)
    for linear, (inverse, vectors, gain) in zip(maps, sides, strict=True):
        rank = linear.out_features
        best = (inverse @ vectors[:, :rank] * s[:rank].sqrt()).mT * gain
        linear.weight.copy_(F.pad(best, (0, 0, 0, rank - len(best))))
        linear.bias.zero_()


def _root(x: Tensor) -> tuple[Tensor, Tensor]:
    """Square root of the second moment of rows ``[..., D]`` and its inverse, ``[D, D]`` float64."""
    rows = x.flatten(0, -2).double()
    values, vectors = torch.linalg.eigh(rows.mT @ rows / len(rows))
    roots = values.clamp_min(values[-1] * 1e-6 + 1e-12).sqrt()
    return vectors * roots @ vectors.mT, vectors / roots @ vectors.mT
