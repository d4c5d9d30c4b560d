"""What ``"auto"`` stands for: one table, so that a line keeps the same keys on every machine.

Speeds differ between machines, and only choose the kernel. The rows come from
``benchmarks/quality`` and ``benchmarks/kernels.py``: see docs, What it keeps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from sparsiattn.attention.geometry import Grid, Tile

MOST_CELLS = 144
"""Summary keys of all views together: compiled code counts up to so many cells."""


@dataclass(frozen=True)
class AutoOptions:
    """Options for images of so many tokens.

    Attributes:
        tokens: The number from which on they hold.
        background: Summary keys in each direction of the token grid. More of them lose less of
            what is dropped and cost more; these are where the gain levels off.
        tile: Queries that share their keys: only in tiles can a sparse kernel win by far, and
            below each query choosing for itself costs about as much as dense attention.
        voter: Side of the squares of queries that vote together for the keys of their tile.
            Smaller ones choose better, at the square of the price.

    Where attention is most of the time, tiles are larger and the summary smaller: with so many
    keys less is lost.
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
"""By the number of tokens, in rising order."""

BLOCKS: tuple[tuple[int, Tile], ...] = ((32, (2, 2)), (128, (4, 4)))
"""Keys that are chosen together in tiles, from so many kept keys on; single ones below."""

TILE_FROM = next(row.tokens for row in TABLE if row.tile != 1)
"""From this many tokens on, queries share keys in tiles."""


def auto_options(tokens: int) -> AutoOptions:
    """The row for that many tokens.

    >>> auto_options(197).tile, auto_options(1370).tile
    (1, (8, 4))
    """
    return next(row for row in reversed(TABLE) if tokens >= row.tokens)


def auto_background(grid: Grid, views: int = 1) -> int:
    """Summary keys in each direction of a token grid, or of each of its views.

    Args:
        grid: Rows and columns, of all views one below the other.
        views: Images or frames in the grid.

    >>> auto_background((7, 7)), auto_background((14, 14)), auto_background((37, 37))
    (2, 5, 10)
    >>> auto_background((6 * 28, 37), 6), auto_background((20 * 28, 37), 20)
    (4, 2)
    """
    most = auto_options(grid[0] * grid[1]).background
    return most if views == 1 else max(1, min(most, math.isqrt(MOST_CELLS // views)))


def auto_block(kept_keys: int) -> Tile:
    """Keys that are chosen together in tiles where so many are kept.

    >>> auto_block(20), auto_block(409)
    (1, (4, 4))
    """
    return next((block for least, block in reversed(BLOCKS) if kept_keys >= least), 1)
