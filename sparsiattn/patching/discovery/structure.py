"""Derives the structure of a site's sequence from the pixels that its tokens come from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from sparsiattn.attention.geometry import Grid
from sparsiattn.attention.layout import Layout
from sparsiattn.attention.packing import PackedPart
from sparsiattn.attention.structure import NO_PATCHES, Structure
from sparsiattn.patching.discovery.pixel_numbers import PADDING, UNKNOWN
from sparsiattn.patching.discovery.probe import AttentionCall


def traced_structure(call: AttentionCall, layout: Layout) -> tuple[Structure | None, Grid | None]:
    """The structure of a call's queries and the grid of its keys, as traced from pixels.

    Args:
        call: The attention call of a dry run.
        layout: How its host lays out operands.

    Returns:
        Structure and grid; None for both if pixels do not determine them, and None for the grid if
        the module has a halo, which determines it.
    """
    if call.parts:
        packed = _packed(call.parts)
        return packed, packed.stacked_grid
    if call.q[-2] == 1:
        return Structure((1, 1), raster=False, source="a single query"), (1, call.k[-2])
    origin = "traced from the image" + ("" if call.map is None else f" through {call.map.name!r}")
    queries, keys = (
        read_structure(_by_window(places, layout), call.image, origin)
        for places in (call.q_places, call.k_places)
    )
    if queries is not None and isinstance(getattr(call.module, "halo_size", None), int):
        return queries, None
    if queries is not None and call.q_places is not None and not (call.q_places >= 0).any():
        return queries, (1, call.k[-2])
    if queries is None or keys is None or queries.special_count != keys.special_count:
        return None, None
    return replace(queries, raster=queries.raster and keys.raster), keys.stacked_grid


def _packed(parts: Sequence[PackedPart]) -> Structure:
    """The structure of the largest of several images in one sequence."""
    largest = max(parts, key=lambda part: part.tokens)
    return Structure(
        largest.grid,
        largest.frames,
        merge=largest.merge,
        packed=True,
        source="the largest image; each has its own size",
    )


def _by_window(places: Tensor | None, layout: Layout) -> Tensor | None:
    """Pixel numbers as ``[windows, tokens]``, from the host's layout without the last dimension."""
    return None if places is None else layout.fold(places.unsqueeze(-1))[:, 0, :, 0]


def read_structure(places: Tensor | None, image: Sequence[int], source: str) -> Structure | None:
    """The structure of sequences, given the pixels of their tokens.

    Args:
        places: Number of the pixel that each token comes from, ``[windows, tokens]``; see
            `sparsiattn.patching.discovery.pixel_tracking`.
        image: Shape of the model's image ``[..., H, W]``.
        source: The `Structure.source` of the result.

    Returns:
        The structure of one window; None if the pixels do not determine it.
    """
    if places is None or bool((places == UNKNOWN).any()):
        return None
    if not bool((places >= 0).any()):  # queries of a decoder
        count = places.shape[-1]
        return Structure((1, count), raster=False, source=NO_PATCHES)
    structure = _read(tuple(places.flatten().tolist()), tuple(places.shape), tuple(image))
    return None if structure is None else replace(structure, source=source)


@lru_cache(maxsize=256)  # the blocks of a model and of its copies have the same
def _read(
    numbers: tuple[int, ...], shape: tuple[int, ...], image: tuple[int, ...]
) -> Structure | None:
    """The structure for these pixel numbers, without its source."""
    places = torch.tensor(numbers, dtype=torch.int32, device="cpu").view(shape)
    places = places[(places >= 0).any(-1)]  # windows that are all padding are ignored
    return _window(places, image) if len(places) > 1 else _sequence(places[0], image)


def _margins(special: Tensor) -> tuple[int, int]:
    """Number of special tokens before the first patch and after the last one.

    Args:
        special: Boolean ``[windows, tokens]``, True for special tokens.
    """
    patch = ~special
    lead = int(patch.to(torch.uint8).argmax(-1).min())
    trail = int(patch.flip(-1).to(torch.uint8).argmax(-1).min())
    return lead, trail


def _coordinates(numbers: Tensor, image: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """View, row and column of pixels."""
    height, width = image[-2:]
    return numbers // (height * width), numbers // width % height, numbers % width


def _sequence(numbers: Tensor, image: Sequence[int]) -> Structure | None:
    """One sequence over the whole image, or over several."""
    special = numbers < 0
    patches = numbers[~special]
    if len(patches.unique()) != len(patches):
        return None
    padded = _padded_map(numbers)
    if padded is not None:
        return Structure(padded)
    views = len(_coordinates(patches, image)[0].unique())
    structure = _margins_and_specials(special, views)
    if structure is None:
        return None
    grid = _raster(patches, views, image)
    if grid is None:
        return replace(structure, grid=(1, len(patches) // structure.views), raster=False)
    rows, columns = grid
    if rows * columns == 1 < views:  # one position in several frames: attention over time
        return replace(structure, grid=(1, views), views=1) if not structure.specials else None
    return replace(structure, grid=grid)


def _padded_map(numbers: Tensor) -> tuple[int, int] | None:
    """Rows and columns of a window that is larger than the feature map in it."""
    not_pixels = numbers[numbers < 0]
    at = (numbers >= 0).nonzero().flatten()
    if len(not_pixels) == 0 or bool((not_pixels != PADDING).any()):
        return None
    breaks = (at.diff() > 1).nonzero().flatten()
    if len(breaks) == 0:
        return None
    columns = int(at[breaks[0] + 1] - at[0])
    width = int(breaks[0]) + 1
    is_rectangle = len(numbers) % columns == 0 and len(at) % width == 0
    if not is_rectangle or bool((at.view(-1, width).diff(dim=0) != columns).any()):
        return None
    return len(numbers) // columns, columns


def _margins_and_specials(special: Tensor, views: int) -> Structure | None:
    """A structure with the positions of special tokens; its grid is not set yet."""
    n = len(special)
    if views > 1 and n % views == 0:
        by_view = special.view(views, -1)
        if bool(by_view[0].any()) and bool((by_view == by_view[0]).all()):
            at = tuple(by_view[0].nonzero().flatten().tolist())
            return Structure((1, 1), views, specials=at)
    lead, trail = _margins(special[None])
    inner = special[lead : n - trail]
    if views > 1 and bool(inner.any()):
        if len(inner) % views or bool((inner.view(views, -1) != inner.view(views, -1)[0]).any()):
            return None
        inner = inner.view(views, -1)[0]
    at = tuple(inner.nonzero().flatten().tolist())
    return Structure((1, 1), views, prefix=lead, suffix=trail, specials=at)


def _raster(patches: Tensor, views: int, image: Sequence[int]) -> tuple[int, int] | None:
    """Rows and columns of one view's patches, if they are in raster order, view after view."""
    if len(patches) % views or bool((patches[1:] <= patches[:-1]).any()):
        return None
    view, row, column = (x.view(views, -1) for x in _coordinates(patches, image))
    grid = _product(row, column)
    return grid if grid and bool((view == view[:, :1]).all()) else None


def _product(row: Tensor, column: Tensor) -> tuple[int, int] | None:
    """Rows and columns of positions ``[windows, n]``, if all windows are rectangles of one size."""
    changed = row[0] != row[0, 0]
    columns = int(changed.to(torch.uint8).argmax()) if bool(changed.any()) else row.shape[1]
    if row.shape[1] % columns:
        return None
    row, column = (x.unflatten(1, (-1, columns)) for x in (row, column))
    straight = bool((row == row[:, :, :1]).all()) and bool((column == column[:, :1]).all())
    return (row.shape[1], columns) if straight else None


def _window(places: Tensor, image: Sequence[int]) -> Structure | None:
    """The structure of windows, or of images that attend separately.

    Shifted windows wrap around the border.
    """
    lead, trail = _margins(places < 0)
    body = places[:, lead : places.shape[1] - trail]
    body = body[(body >= 0).all(-1)]  # the other windows are padded
    if len(body) == 0:
        return None
    ordered = body.sort(-1).values
    if bool((ordered[:, 1:] == ordered[:, :-1]).any()):
        return None
    views, rows, columns = _coordinates(body, image)
    size, grid = body.shape[1], _product(rows, columns)
    if grid == (1, size) and bool((views != views[:, :1]).any()):
        return Structure((1, size), prefix=lead, suffix=trail)  # one position in several frames
    if grid is None or bool((views != views[:, :1]).any()):
        return Structure((1, size), prefix=lead, suffix=trail, raster=False)
    return Structure(grid, prefix=lead, suffix=trail)
