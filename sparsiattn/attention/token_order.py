"""`TokenOrder`: the order in which planners get the tokens of a call, if it is not the host's."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsiattn.attention import geometry
from sparsiattn.attention.geometry import Sides, Tile


@dataclass(frozen=True)
class TokenOrder:
    """The order in which planners get the tokens of one sequence: special tokens, then patches.

    Without ``grid``, patches keep the order that the host has them in. With it, they are in raster
    order, frame by frame; or, with ``depth`` frames, row by row, where the rows of ``depth``
    consecutive frames alternate. A tile of rows and columns then spans several frames.

    Attributes:
        tokens: Length of the sequence.
        prefix: Number of special tokens before the first view.
        suffix: Number of special tokens after the last view.
        views: Number of images or frames in the sequence.
        specials: Positions of special tokens within every view.
        grid: Rows and columns of one view; None to keep the order of patches.
        merge: Side of the squares of patches that the host keeps together, square by square in
            raster order; 1 if the host's patches are in raster order themselves.
        window: Side of the windows that the host keeps together in the same way, in patches; None
            if it does not.
        depth: Number of consecutive views whose rows alternate.

    >>> TokenOrder(6, 1, 2).pick(torch.device("cpu")).tolist()
    [0, 4, 5, 1, 2, 3]
    >>> TokenOrder(8, grid=(2, 4), merge=2).pick(torch.device("cpu")).tolist()
    [0, 1, 4, 5, 2, 3, 6, 7]
    >>> TokenOrder(8, views=2, grid=(2, 2), depth=2).pick(torch.device("cpu")).tolist()
    [0, 1, 4, 5, 2, 3, 6, 7]
    """

    tokens: int
    prefix: int = 0
    suffix: int = 0
    views: int = 1
    specials: tuple[int, ...] = ()
    grid: geometry.Grid | None = None
    merge: int = 1
    window: int | None = None
    depth: int = 1

    def pick(self, device: torch.device) -> Tensor:
        """The position in the host's sequence of every token that planners get, ``[N]``."""
        return self._tables(device)[0]

    def back(self, device: torch.device) -> Tensor:
        """The inverse of `pick`: where planners get every token of the host's sequence, ``[N]``."""
        return self._tables(device)[1]

    def _tables(self, device: torch.device) -> tuple[Tensor, Tensor]:
        tables: tuple[Tensor, Tensor] = geometry.table(pick_and_back, self, device=device)
        return tables

    def apply(self, x: Tensor) -> Tensor:
        """Tokens ``[..., N, D]`` from the host's order to that of planners."""
        return x.index_select(-2, self.pick(x.device))

    def undo(self, x: Tensor) -> Tensor:
        """Tokens ``[..., N, D]`` from the order of planners back to the host's."""
        return x.index_select(-2, self.back(x.device))


def pick_and_back(order: TokenOrder, *, device: torch.device) -> tuple[Tensor, Tensor]:
    """`TokenOrder.pick` and its inverse, ``[N]`` each."""
    is_special = _special_tokens(order, device)
    places = torch.argsort((~is_special).to(torch.uint8), stable=True)
    if order.grid is not None:
        patches = order.views * math.prod(order.grid)
        specials = order.tokens - patches
        places = torch.cat([places[:specials], places[specials:][_raster(order, device)]])
    return places, torch.argsort(places)


def _special_tokens(order: TokenOrder, device: torch.device) -> Tensor:
    is_special = torch.zeros(order.tokens, dtype=torch.bool, device=device)
    is_special[: order.prefix] = True
    is_special[order.tokens - order.suffix :] = True
    length = (order.tokens - order.prefix - order.suffix) // order.views
    for view in range(order.views if order.specials else 0):
        at = torch.tensor(order.specials, device=device) + order.prefix + view * length
        is_special[at] = True
    return is_special


def _raster(order: TokenOrder, device: torch.device) -> Tensor:
    """Where the host has every patch, counting patches only, ``[n]``."""
    assert order.grid is not None
    rows, columns = order.grid
    place = torch.arange(order.views * rows * columns, device=device)
    view, row, column = place // (rows * columns), place // columns % rows, place % columns
    key = view
    for side in (order.window, order.merge, 1):
        if side is not None:  # the host's order: windows, then squares in them, then patches
            key = (key * -(-rows // side) + row // side) * -(-columns // side) + column // side
    places = torch.argsort(torch.argsort(key))
    groups = places.view(order.views // order.depth, order.depth, rows, columns)
    return groups.transpose(1, 2).flatten()


def depth_of(tile: int | Sides, views: int) -> int:
    """How many frames a tile spans: as many as it asks for, or fewer that divide their number.

    >>> depth_of((2, 4, 4), 8), depth_of((4, 4, 4), 6), depth_of((4, 4), 6)
    (2, 3, 1)
    """
    most = tile[0] if not isinstance(tile, int) and len(tile) == 3 else 1
    return max(depth for depth in range(1, most + 1) if views % depth == 0)


def alternated(sides: int | Sides, depth: int) -> Tile:
    """Tile or block as rows and columns of a grid in which the rows of several frames alternate.

    Args:
        sides: 1; rows and columns; or frames, rows and columns.
        depth: Number of frames whose rows alternate.

    >>> alternated((2, 4, 4), 2), alternated((4, 4), 2), alternated((1, 2), 3)
    ((8, 4), (4, 4), (3, 2))
    """
    if isinstance(sides, int):
        return sides
    if len(sides) == 3:
        return sides[1] * depth, sides[2]
    return -(-sides[0] // depth) * depth, sides[1]
