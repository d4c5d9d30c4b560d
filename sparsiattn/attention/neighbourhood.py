"""Neighbourhoods: windows that follow their query and are shifted inwards at the border.

The definition is NATTEN's (arXiv 2204.07143), and that of its stride (arXiv 2504.16922): the
queries of a tile share the window of one of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsiattn.attention.geometry import Grid


def neighbourhood(
    grid: Grid, window: Grid, parts: Grid | None, prefix: int, *, device: torch.device
) -> Tensor:
    """Keys of every query's window, or of every tile's, int64 ``[1, 1, R, prefix + window]``.

    A window of even size has one more row above its query than below, and one more column to its
    left. A tile has the window of its middle query, the later one of two.

    Args:
        grid: Rows and columns of the patches.
        window: Rows and columns of a window, at most those of the grid.
        parts: Number of tiles in each direction; None for one window per query.
        prefix: Number of leading keys, which are in every list.
        device: Device of the result.

    >>> cpu = torch.device("cpu")
    >>> neighbourhood((1, 5), (1, 3), None, 0, device=cpu).tolist()
    [[[[0, 1, 2], [0, 1, 2], [1, 2, 3], [2, 3, 4], [2, 3, 4]]]]
    >>> neighbourhood((1, 6), (1, 2), (1, 2), 1, device=cpu).tolist()
    [[[[0, 1, 2], [0, 4, 5]]]]
    """
    rows, columns = (
        _along(side, size, count, device)
        for side, size, count in zip(grid, window, grid if parts is None else parts, strict=True)
    )
    keys = rows[:, None, :, None] * grid[1] + columns[None, :, None, :] + prefix
    lists = keys.flatten(2).flatten(0, 1)
    first = torch.arange(prefix, device=device).expand(len(lists), -1)
    return torch.cat([first, lists], dim=-1)[None, None]


def _along(side: int, window: int, parts: int, device: torch.device) -> Tensor:
    """Rows (or columns) in the window of every part of a side, ``[parts, window]``."""
    ends = (torch.arange(parts + 1, device=device) * side + parts - 1) // parts
    middle = ends[:-1] + (ends[1:] - ends[:-1]) // 2
    first = (middle - window // 2).clamp(0, side - window)
    return first[:, None] + torch.arange(window, device=device)
