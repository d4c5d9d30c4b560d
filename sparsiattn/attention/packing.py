"""Images with sizes of their own: end to end in one sequence, or in padded rows of a batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from sparsiattn.attention.geometry import Grid
from sparsiattn.attention.token_order import TokenOrder

Size = tuple[int, int, int]
"""Frames, rows and columns of one image (or clip), in patches."""


@dataclass(frozen=True)
class PackedPart:
    """A part of a sequence whose tokens attend to each other: an image, a clip or a window.

    Attributes:
        grid: Rows and columns of patches, of one frame.
        frames: Number of frames.
        merge: As in `PackedInput`.
        window: Side of the windows that the patches of a frame are sorted by, in patches; None if
            they are not.
    """

    grid: Grid
    frames: int = 1
    merge: int = 1
    window: int | None = None

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return self.frames * math.prod(self.grid)

    @property
    def stacked_grid(self) -> Grid:
        """Rows and columns of all frames stacked vertically."""
        return self.frames * self.grid[0], self.grid[1]


@dataclass(frozen=True)
class PackedInput:
    """How a module of a model takes several images as one sequence of patches.

    An adapter returns it from `Backbone.packed_input`. A dry run compares it with the positions
    that the model itself computes, rows and columns that a module takes as an argument or that a
    table is indexed with; if they differ, the order of patches counts as unknown.

    Attributes:
        module: Path of the module.
        sizes: Name of its argument with frames, rows and columns of every image, ``[images, 3]``.
        merge: Side of the squares of patches that are together in the sequence, one square after
            another in raster order; 1 for raster order.
        window: Rows and columns of the windows that some layers attend in, in patches, a multiple
            of ``merge``; None if there are none. The patches of a window are together then.
        bounds: Name of its optional argument with the first token of every image and the number
            of tokens.
        by_row: Whether every image is a row of the batch, in raster order and padded at its end.
            Then ``sizes`` names an argument with rows and columns, ``[images, 2]``, or with column
            and row of every patch and -1 for padding, ``[images, patches, 2]``.

    >>> PackedInput("", merge=2).packing(((1, 4, 4), (2, 2, 4))).tokens
    32
    """

    module: str
    sizes: str = "grid_thw"
    merge: int = 1
    window: int | None = None
    bounds: str = "cu_seqlens"
    by_row: bool = False

    def packing(self, images: Sequence[Size]) -> Packing:
        """The packing of images of these sizes."""
        return Packing(tuple(images), self.merge, self.window, self.by_row)

    def arguments(
        self, forward: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> dict[str, Any]:
        """The arguments of a call of the module, by name."""
        return {**dict(zip(signature(forward).parameters, args, strict=False)), **kwargs}


@dataclass(frozen=True)
class Packing:
    """One sequence of several images, or one batch of padded rows.

    Attributes:
        images: Frames, rows and columns of every image.
        merge: As in `PackedInput`.
        window: As in `PackedInput`.
        by_row: As in `PackedInput`.
    """

    images: tuple[Size, ...]
    merge: int = 1
    window: int | None = None
    by_row: bool = False

    @property
    def tokens(self) -> int:
        """Number of tokens of all images."""
        return sum(map(math.prod, self.images))

    def find(self, start: int, tokens: int) -> PackedPart | None:
        """The frame, clip or window that begins at a token of the sequence.

        Args:
            start: The first token.
            tokens: How many tokens it has.

        Returns:
            The part; None if none begins there or has another number of tokens.
        """
        return _by_place(self).get((start, tokens))

    def follow(self, lengths: Iterable[int]) -> tuple[PackedPart, ...] | None:
        """The parts of these lengths, one after another; None unless they are the sequence."""
        start, parts = 0, []
        for length in lengths:
            part = self.find(start, length)
            if part is None:
                return None
            parts.append(part)
            start += length
        return tuple(parts) if start == self.tokens else None

    def frames(self) -> tuple[PackedPart, ...]:
        """One part for every frame."""
        return tuple(
            PackedPart((rows, columns), 1, self.merge, self.window)
            for frames, rows, columns in self.images
            for _ in range(frames)
        )

    def clips(self) -> tuple[PackedPart, ...]:
        """One part for every image, with all of its frames."""
        return tuple(
            PackedPart((rows, columns), frames, self.merge, self.window)
            for frames, rows, columns in self.images
        )

    def windows(self) -> tuple[PackedPart, ...]:
        """One part for every window of every frame; windows at the border may be smaller."""
        if self.window is None:
            return ()
        return tuple(
            PackedPart((height, width), 1, self.merge)
            for frame in self.frames()
            for height in _cut(frame.grid[0], self.window)
            for width in _cut(frame.grid[1], self.window)
        )

    def positions(self) -> Tensor:
        """Row and column of every patch in its image, without windows, ``[tokens, 2]``."""
        parts = []
        for frame in self.frames():
            columns = frame.grid[1]
            order = TokenOrder(frame.tokens, grid=frame.grid, merge=self.merge)
            raster = order.back(torch.device("cpu"))
            parts.append(torch.stack([raster // columns, raster % columns], dim=-1))
        return torch.cat(parts) if parts else torch.zeros(0, 2, dtype=torch.long, device="cpu")

    def fits(self, positions: Tensor) -> bool:
        """Whether these are the rows and columns of the patches in their images.

        Args:
            positions: Rows and columns as the last two columns, ``[tokens, 2 or more]``.
        """
        own = self.positions()
        return len(own) == len(positions) and bool((own == positions[:, -2:].cpu()).all())

    def __str__(self) -> str:
        return ", ".join(" x ".join(map(str, size)) for size in self.images)


def _cut(side: int, window: int) -> list[int]:
    """Sides of the windows along one side of an image.

    >>> _cut(10, 4)
    [4, 4, 2]
    """
    return [min(window, side - start) for start in range(0, side, window)]


@lru_cache(maxsize=256)
def _by_place(packing: Packing) -> dict[tuple[int, int], PackedPart]:
    """Frames, clips and windows by their first token and their number of tokens."""
    found: dict[tuple[int, int], PackedPart] = {}
    for parts in (packing.windows(), packing.clips(), packing.frames()):
        start = 0
        for part in parts:
            found[start, part.tokens] = part
            start += part.tokens
    return found


def sizes_of_rows(given: Tensor) -> list[Size] | None:
    """Sizes of the images in padded rows, from an argument as in `PackedInput.by_row`.

    Returns:
        Frames (one), rows and columns; None if the patches of a row are not in raster order.

    >>> sizes_of_rows(torch.tensor([[[0, 0], [1, 0], [-1, -1]]]))
    [(1, 1, 2)]
    """
    if given.dim() == 2:
        return [(1, rows, columns) for rows, columns in given.tolist()]
    columns, rows = given.cpu().amax(1).add(1).unbind(-1)
    place = torch.arange(given.shape[1], device="cpu").expand(len(given), -1)
    wide = columns[:, None].clamp_min(1)
    raster = torch.stack([place % wide, place // wide], dim=-1)
    raster = torch.where((place < (rows * columns)[:, None])[..., None], raster, -1)
    if not torch.equal(raster, given.cpu().to(raster.dtype)):
        return None
    return [
        (1, height, width) for height, width in zip(rows.tolist(), columns.tolist(), strict=True)
    ]
