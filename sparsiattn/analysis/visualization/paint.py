"""Draw attention, kept keys and token groups over the photo, as arrays of colours."""

from __future__ import annotations

from collections.abc import Sequence
from colorsys import hsv_to_rgb
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

SIDE = 224  # pixels; smaller photos are enlarged to this size by repeating pixels

# Colours of attention from low to high: the colour map "inferno" (CC0) at equal steps.
STOPS = ("000004", "280b54", "65156e", "9f2a63", "d44842", "f57d15", "fac127", "fcffa4")


def enlarged(pixels: Array) -> Array:
    """``[H, W, 3]`` uint8 with at least `SIDE` pixels on the shorter side, by repeating pixels."""
    factor = max(1, -(-SIDE // min(pixels.shape[:2])))
    return pixels.repeat(factor, 0).repeat(factor, 1)


def spread(values: Array, shape: tuple[int, ...]) -> Array:
    """Expand values ``[rows, columns]`` of patches to ``[H, W]`` of pixels.

    >>> spread(np.array([[1, 2]]), (2, 4)).tolist()
    [[1, 1, 2, 2], [1, 1, 2, 2]]
    """
    row, column = (
        np.arange(size) * count // size for size, count in zip(shape, values.shape, strict=False)
    )
    by_pixel: Array = values[row[:, None], column[None]]
    return by_pixel


def ramp(share: Array) -> Array:
    """Shares in [0, 1] as colours, ``[..., 3]`` in [0, 255]."""
    stops = np.array([list(bytes.fromhex(stop)) for stop in STOPS], dtype=float)
    places = np.linspace(0, 1, len(stops))
    return np.stack([np.interp(share, places, channel) for channel in stops.T], axis=-1)


def heat(pixels: Array, values: Array, top: float) -> Array:
    """Draw attention over a dimmed grey photo.

    Args:
        pixels: ``[H, W, 3]`` uint8.
        values: ``[rows, columns]``; brightness is the square root of their share of ``top``.
        top: The value with full brightness.

    Returns:
        Colours, uint8; at least `SIDE` pixels on the shorter side.
    """
    photo = enlarged(pixels)
    share = np.sqrt(np.clip(spread(values, photo.shape[:2]) / max(top, 1e-12), 0, 1))
    base = 0.5 * _grey(photo)
    cover = (0.9 * share**0.5)[..., None]
    return _bytes(base * (1 - cover) + ramp(share) * cover)


def spotlight(pixels: Array, share: Array) -> Array:
    """Draw the photo in colour where keys are kept (by share of heads), and dark elsewhere."""
    photo = enlarged(pixels)
    cover = spread(share, photo.shape[:2])[..., None]
    faded = 0.2 * _grey(photo)
    return _bytes(faded * (1 - cover) + photo * cover)


def tokens(pixels: Array, place: Array, fused: Sequence[int] = ()) -> Array:
    """Draw the photo with dropped patches dark and merged patches in one colour.

    The patches of each merged token have their mean colour, tinted and outlined.

    Args:
        pixels: ``[H, W, 3]`` uint8.
        place: ``[rows, columns]``, the token of each patch; -1 if it was dropped.
        fused: Tokens that contain dropped patches; these patches count as dropped.

    Returns:
        Colours, uint8; at least `SIDE` pixels on the shorter side.
    """
    photo = enlarged(pixels).astype(float)
    place = np.where(np.isin(place, list(fused)), -1, place)
    group = spread(place, photo.shape[:2])
    sizes = np.bincount(place[place >= 0], minlength=int(place.max(initial=0)) + 1)
    # the tint depends on a token's first patch, so it stays when earlier tokens are dropped
    first = {token: patch for patch, token in reversed(list(enumerate(place.flatten().tolist())))}
    painted = photo.copy()
    for token in np.flatnonzero(sizes > 1):
        inside = group == token
        painted[inside] = 0.72 * photo[inside].mean(0) + 0.28 * hue(first[int(token)])
    merged = (group >= 0) & (sizes[np.maximum(group, 0)] > 1)
    painted[_borders(group, merged)] = 255
    painted[group < 0] = 0.16 * _grey(photo)[group < 0]
    return _bytes(painted)


def hue(number: int) -> Array:
    """A bright colour for each number; consecutive numbers differ much (golden ratio steps)."""
    return 255 * np.array(hsv_to_rgb((number * 0.61803398875) % 1.0, 0.85, 1.0))


def _borders(group: Array, merged: Array) -> Array:
    """Pixels whose lower or right neighbour is in another token, if one of both is merged."""
    borders = np.zeros(group.shape, dtype=bool)
    for here, there in ((np.s_[:-1], np.s_[1:]), (np.s_[:, :-1], np.s_[:, 1:])):
        borders[here] |= (group[here] != group[there]) & (merged[here] | merged[there])
    return borders


def _grey(photo: Array) -> Array:
    grey: Array = (photo @ np.array([0.299, 0.587, 0.114]))[..., None].repeat(3, -1)
    return grey


def _bytes(colours: Array) -> Array:
    return np.clip(colours, 0, 255).round().astype(np.uint8)
