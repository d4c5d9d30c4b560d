"""How blocks cut a map of tokens into windows, shifted or not: which tokens, which may not meet."""

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
"""What Swin adds to logits of tokens that are no neighbours in the image (arXiv 2103.14030)."""


@dataclass(frozen=True)
class WindowCut:
    """The windows of one block.

    Attributes:
        window: Rows and columns of a window.
        shift: By how many rows and columns the map is rolled before it is cut.
        parameters: Names of the arguments of the block's forward.
    """

    window: Grid
    shift: Grid
    parameters: tuple[str, ...] = ()

    @classmethod
    def of(cls, block: Any, parameters: Iterable[str] = ()) -> WindowCut | None:
        """As a block's attributes say, or those of its attention; None if none do."""
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
        """The cut of a map of this size: one window as large as the map is not shifted.

        Raises:
            InvalidOption: The host would pad the map.
        """
        if all(size >= side for size, side in zip(self.window, grid, strict=True)):
            return replace(self, window=grid, shift=(0, 0))
        spanned = any(size >= side for size, side in zip(self.window, grid, strict=True))
        if spanned or any(side % size for size, side in zip(self.window, grid, strict=True)):
            raise InvalidOption(
                f"skip='window' needs a map that windows of {self.window} tokens divide, got "
                f"{grid}: choose an image size whose maps they divide, or skip='mlp'"
            )
        return self

    def count(self, grid: Grid) -> Grid:
        """Rows and columns of windows."""
        return grid[0] // self.window[0], grid[1] // self.window[1]

    def order(self, grid: Grid, device: torch.device) -> Tensor:
        """See `window_order`."""
        return geometry.table(window_order, grid, self.window, self.shift, device=device)

    def mask(self, grid: Grid, device: torch.device) -> Tensor | None:
        """See `window_mask`; None where nothing is shifted."""
        if not any(self.shift):
            return None
        return geometry.table(window_mask, grid, self.window, self.shift, device=device)


def _sides(size: Any) -> Grid | None:
    pair = tuple(size) if isinstance(size, (tuple, list)) else (size, size)
    known = len(pair) == 2 and all(type(side) is int or hasattr(side, "__int__") for side in pair)
    return (int(pair[0]), int(pair[1])) if known else None


def window_order(grid: Grid, window: Grid, shift: Grid, *, device: torch.device) -> Tensor:
    """Raster numbers of every window's tokens, ``[windows, N]``, as a block takes them.

    A block that shifts rolls what it takes, be it one window alone: so each window is rolled the
    other way beforehand.

    >>> window_order((2, 4), (2, 2), (0, 0), device=torch.device("cpu")).tolist()
    [[0, 1, 4, 5], [2, 3, 6, 7]]
    """
    tokens = torch.arange(grid[0] * grid[1], device=device).view(grid)
    windows = _cut(tokens.roll((-shift[0], -shift[1]), (0, 1)), window)
    return windows.roll(shift, (1, 2)).flatten(1)


def window_mask(grid: Grid, window: Grid, shift: Grid, *, device: torch.device) -> Tensor:
    """What is added to the logits of every window after the shift, ``[windows, N, N]``.

    Tokens that the roll brought together from opposite ends of the map may not attend to each
    other.
    """
    rows, columns = (
        _region(side, size, by, device) for side, size, by in zip(grid, window, shift, strict=True)
    )
    regions = _cut(3 * rows[:, None] + columns, window).flatten(1)
    apart = regions[:, :, None] != regions[:, None]
    return torch.zeros(apart.shape, device=device).masked_fill(apart, FORBIDDEN)


def _region(side: int, size: int, shift: int, device: torch.device) -> Tensor:
    """Which of three parts of a rolled map each row (or column) is from."""
    place = torch.arange(side, device=device)
    return (place >= side - size).long() + (place >= side - shift).long()


def _cut(values: Tensor, window: Grid) -> Tensor:
    """``[H, W]`` as windows ``[windows, rows, columns]``."""
    rows, columns = values.shape[0] // window[0], values.shape[1] // window[1]
    cut = values.view(rows, window[0], columns, window[1])
    return cut.transpose(1, 2).reshape(rows * columns, *window)
