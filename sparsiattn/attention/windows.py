"""Windows and shifted windows: the tokens of each, and the pairs that must not attend."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sparsiattn.attention import geometry
from sparsiattn.attention.geometry import Grid
from sparsiattn.errors import InvalidOption

FORBIDDEN = -100.0
"""Swin adds this to the logits of tokens that are not adjacent in the image (arXiv 2103.14030)."""


@dataclass(frozen=True)
class WindowCut:
    """The windows of one block.

    Attributes:
        window: Rows and columns of a window.
        shift: Rows and columns by which the feature map is rolled before it is cut.
        parameters: Names of the arguments of the block's forward.
    """

    window: Grid
    shift: Grid
    parameters: tuple[str, ...] = ()

    @classmethod
    def of(cls, block: Any, parameters: Iterable[str] = ()) -> WindowCut | None:
        """Read from the attributes of a block or of its attention; None if they have none."""
        return cls._said_by(block, parameters) or cls._said_by(
            getattr(block, "attn", None), parameters
        )

    @classmethod
    def _said_by(cls, module: Any, parameters: Iterable[str]) -> WindowCut | None:
        sizes = [getattr(module, name, None) for name in ("window_size", "shift_size")]
        window, shift = map(_sides, sizes)
        if window is None or shift is None:
            return None
        return cls(window, shift, tuple(parameters))

    def at(self, grid: Grid) -> WindowCut:
        """The windows of a map of this size; a window that covers the map is not shifted.

        Raises:
            InvalidOption: The host would pad the map.
        """
        if all(size >= side for size, side in zip(self.window, grid, strict=True)):
            return replace(self, window=grid, shift=(0, 0))
        spanned = any(size >= side for size, side in zip(self.window, grid, strict=True))
        if spanned or any(side % size for size, side in zip(self.window, grid, strict=True)):
            raise InvalidOption(
                "skip='window' needs feature maps whose sides are multiples of the window "
                f"{self.window}, got {grid}: choose such an image size, or skip='mlp'"
            )
        return self

    def count(self, grid: Grid) -> Grid:
        """Number of windows in each direction, (rows, columns)."""
        return grid[0] // self.window[0], grid[1] // self.window[1]

    def order(self, grid: Grid, device: torch.device) -> Tensor:
        """`window_order` of this cut, cached."""
        return geometry.table(window_order, grid, self.window, self.shift, device=device)

    def mask(self, grid: Grid, device: torch.device) -> Tensor | None:
        """`window_mask` of this cut, cached; None without a shift."""
        if not any(self.shift):
            return None
        return geometry.table(window_mask, grid, self.window, self.shift, device=device)


def _sides(size: Any) -> Grid | None:
    pair = tuple(size) if isinstance(size, (tuple, list)) else (size, size)
    known = len(pair) == 2 and all(type(side) is int or hasattr(side, "__int__") for side in pair)
    return (int(pair[0]), int(pair[1])) if known else None


def window_order(grid: Grid, window: Grid, shift: Grid, *, device: torch.device) -> Tensor:
    """Raster indices of every window's tokens, ``[windows, N]``, in the order a block takes them.

    A block with a shift rolls its input, even if that is a single window, so each window is rolled
    the opposite way beforehand.

    >>> window_order((2, 4), (2, 2), (0, 0), device=torch.device("cpu")).tolist()
    [[0, 1, 4, 5], [2, 3, 6, 7]]
    """
    tokens = torch.arange(grid[0] * grid[1], device=device).view(grid)
    windows = _cut(tokens.roll((-shift[0], -shift[1]), (0, 1)), window)
    return windows.roll(shift, (1, 2)).flatten(1)


def window_mask(grid: Grid, window: Grid, shift: Grid, *, device: torch.device) -> Tensor:
    """The additive mask of every window after the shift, ``[windows, N, N]``.

    Tokens that the roll brings together from opposite ends of the map must not attend to each
    other.
    """
    rows, columns = (
        _region(side, size, by, device) for side, size, by in zip(grid, window, shift, strict=True)
    )
    regions = _cut(3 * rows[:, None] + columns, window).flatten(1)
    apart = regions[:, :, None] != regions[:, None]
    return torch.zeros(apart.shape, device=device).masked_fill(apart, FORBIDDEN)


def _region(side: int, size: int, shift: int, device: torch.device) -> Tensor:
    """Which of the three regions of a rolled map each row (or column) belongs to."""
    place = torch.arange(side, device=device)
    return (place >= side - size).long() + (place >= side - shift).long()


def _cut(values: Tensor, window: Grid) -> Tensor:
    """Cut ``[H, W]`` into windows ``[windows, rows, columns]``."""
    rows, columns = values.shape[0] // window[0], values.shape[1] // window[1]
    cut = values.view(rows, window[0], columns, window[1])
    return cut.transpose(1, 2).reshape(rows * columns, *window)
