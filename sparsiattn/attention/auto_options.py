"""The values that ``"auto"`` resolves to, in one table.

They depend on the number of tokens only, so the same call keeps the same keys on every machine.
Speeds, which differ between machines, choose the kernel but never the keys. The rows come from
``benchmarks/quality`` and ``benchmarks/kernels.py``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from sparsiattn.attention.geometry import Grid, Tile

MOST_CELLS = 144
"""Largest number of summary keys over all views: compiled code counts at most that many cells."""


@dataclass(frozen=True)
class AutoOptions:
    """The values of ``"auto"`` for one range of token counts.

    At high token counts attention takes most of the time, so tiles are larger and the summary is
    smaller: with that many keys, less is lost.

    Attributes:
        tokens: Smallest number of tokens that the row applies to.
        background: Summary keys in each direction of the token grid. A finer summary loses less
            of the dropped keys and costs more; beyond these values the gain levels off.
        tile: Queries that share their keys, as (rows, columns) or 1. Sparse kernels are much
            faster than dense attention only with tiles; with one key list per query they cost
            about as much.
        voter: Side of the squares of queries that vote together for the keys of their tile.
            Halving it chooses better keys and makes voting four times as expensive.
    """

    tokens: int
    background: int
    tile: Tile = 1
    voter: int = 1


TABLE = (
    AutoOptions(0, background=2),
    AutoOptions(100, background=5),
    AutoOptions(239, background=6),
    AutoOptions(465, background=7),
    AutoOptions(824, background=8),
    AutoOptions(1024, background=10, tile=(8, 4), voter=2),
    AutoOptions(2304, background=8, tile=(8, 8), voter=4),
    AutoOptions(9216, background=8, tile=(8, 8), voter=8),
)
"""Rows in ascending order of ``tokens``."""

BLOCKS: tuple[tuple[int, Tile], ...] = ((32, (2, 2)), (128, (4, 4)))
"""Pairs ``(kept keys, block)``: from that many kept keys on, tiles choose whole blocks of keys.

Below the smallest number, keys are chosen one by one.
"""

TILE_FROM = next(row.tokens for row in TABLE if row.tile != 1)
"""From this many tokens on, queries share keys in tiles."""


def auto_options(tokens: int) -> AutoOptions:
    """The row of `TABLE` for that many tokens.

    >>> auto_options(197).tile, auto_options(1370).tile
    (1, (8, 4))
    """
    return next(row for row in reversed(TABLE) if tokens >= row.tokens)


def auto_background(grid: Grid, views: int = 1) -> int:
    """Summary keys in each direction of a token grid, or of each of its views.

    Args:
        grid: Rows and columns, of all views stacked vertically.
        views: Number of images or frames in the grid.

    >>> auto_background((7, 7)), auto_background((14, 14)), auto_background((37, 37))
    (2, 5, 10)
    >>> auto_background((6 * 28, 37), 6), auto_background((20 * 28, 37), 20)
    (4, 2)
    """
    most = auto_options(grid[0] * grid[1]).background
    return most if views == 1 else max(1, min(most, math.isqrt(MOST_CELLS // views)))


def auto_block(kept_keys: int) -> Tile:
    """The block of keys that a tile chooses together, given how many keys it keeps.

    >>> auto_block(20), auto_block(409)
    (1, (4, 4))
    """
    return next((block for least, block in reversed(BLOCKS) if kept_keys >= least), 1)
