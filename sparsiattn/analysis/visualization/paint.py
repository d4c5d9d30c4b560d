"""Attention, kept keys and token groups painted over the photo, as arrays of colours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

SIDE = 224  # pixels: smaller photos are enlarged to it, patch by patch

# Colours of attention, from none to most: the colour map "inferno" (CC0) at equal steps.
STOPS = (
    (0, 0, 4), (40, 11, 84), (101, 21, 110), (159, 42, 99), (212, 72, 66), (245, 125, 21),
    (250, 193, 39), (252, 255, 164),
)  # fmt: skip


def enlarged(pixels: Array) -> Array:
    """``[H, W, 3]`` uint8 with at least `SIDE` pixels on the shorter side, by repeating pixels."""
    factor = max(1, -(-SIDE // min(pixels.shape[:2])))
    return pixels.repeat(factor, 0).repeat(factor, 1)


def spread(values: Array, shape: tuple[int, ...]) -> Array:
    """``[rows, columns]`` by patch to ``[H, W]`` by pixel.

    >>> spread(np.array([[1, 2]]), (2, 4)).tolist()
    [[1, 1, 2, 2], [1, 1, 2, 2]]
    """
    rows, columns = (
        np.arange(size) * count // size for size, count in zip(shape, values.shape, strict=False)
    )
    out: Array = values[rows[:, None], columns[None]]
    return out


def ramp(share: Array) -> Array:
    """Shares in [0, 1] as colours, ``[..., 3]`` in [0, 255]."""
    stops = np.array(STOPS, dtype=float)
    at = np.clip(share, 0, 1) * (len(stops) - 1)
    low = np.minimum(at.astype(int), len(stops) - 2)
    part = (at - low)[..., None]
    out: Array = stops[low] * (1 - part) + stops[low + 1] * part
    return out


def heat(pixels: Array, values: Array, top: float) -> Array:
    """Attention ``[rows, columns]`` over the dimmed grey photo, by the square root of its share of
    ``top``."""
    photo = enlarged(pixels)
    share = np.sqrt(np.clip(spread(values, photo.shape[:2]) / max(top, 1e-12), 0, 1))
    base = 0.5 * _grey(photo)
    cover = (0.9 * share**0.5)[..., None]
    return _bytes(base * (1 - cover) + ramp(share) * cover)


def spotlight(pixels: Array, share: Array) -> Array:
    """The photo in its colours where keys are kept (by a share of the heads), dark elsewhere."""
    photo = enlarged(pixels)
    cover = spread(share, photo.shape[:2])[..., None]
    faded = 0.2 * _grey(photo)
    return _bytes(faded * (1 - cover) + photo * cover)


def tokens(pixels: Array, place: Array, fused: Sequence[int] = ()) -> Array:
    """The photo with dropped patches dark, and the patches of each merged token in the mean of
    their colours, tinted and outlined. place: ``[rows, columns]``, -1 where dropped."""
    photo = enlarged(pixels).astype(float)
    place = np.where(np.isin(place, list(fused)), -1, place)
    group = spread(place, photo.shape[:2])
    sizes = np.bincount(place[place >= 0], minlength=int(place.max(initial=0)) + 1)
    # a token is tinted by its first patch, so that it keeps its colour while tokens before it go
    first = {token: at for at, token in reversed(list(enumerate(place.flatten().tolist())))}
    out = photo.copy()
    for token in np.flatnonzero(sizes > 1):
        inside = group == token
        out[inside] = 0.72 * photo[inside].mean(0) + 0.28 * np.array(hue(first[int(token)]))
    merged = (group >= 0) & (sizes[np.maximum(group, 0)] > 1)
    out[_borders(group) & (merged | _borders_of(merged))] = 255
    out[group < 0] = 0.16 * _grey(photo)[group < 0]
    return _bytes(out)


def hue(number: int) -> tuple[float, float, float]:
    """A bright colour for each number, neighbours far apart (steps of the golden ratio)."""
    from colorsys import hsv_to_rgb

    red, green, blue = hsv_to_rgb((number * 0.61803398875) % 1.0, 0.85, 1.0)
    return 255 * red, 255 * green, 255 * blue


def _borders(group: Array) -> Array:
    """Pixels whose lower or right neighbour belongs to another token."""
    found = np.zeros(group.shape, dtype=bool)
    found[:-1] |= group[:-1] != group[1:]
    found[:, :-1] |= group[:, :-1] != group[:, 1:]
    return found


def _borders_of(merged: Array) -> Array:
    """Pixels next to a merged token, above or to the left of it."""
    found = np.zeros(merged.shape, dtype=bool)
    found[:-1] |= merged[1:]
    found[:, :-1] |= merged[:, 1:]
    return found


def _grey(photo: Array) -> Array:
    weights = np.array([0.299, 0.587, 0.114])
    out: Array = (photo @ weights)[..., None].repeat(3, -1)
    return out


def _bytes(colours: Array) -> Array:
    return np.clip(colours, 0, 255).round().astype(np.uint8)
