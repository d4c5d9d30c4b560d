"""Numbers of pixels that tensors without data carry along; see `pixel_tracking`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

UNKNOWN = -1
"""In the place of a pixel's number: the element depends on the image, it is not known where."""
SPECIAL = -2
"""The element does not depend on the image: class tokens, registers, prompts."""
PADDING = -3
"""The element was put beside the image to fill a window."""

PLACES = "_sparsiattn_places"


def places_in(tensor: Tensor) -> Tensor | None:
    """Numbers of pixels, of the tensor's shape (int32 on the CPU); None if it has no image."""
    return getattr(tensor, PLACES, None)


def constant(value: int, shape: Sequence[int]) -> Tensor:
    return torch.tensor(value, dtype=torch.int32, device="cpu").expand(tuple(shape))


def numbers_of(x: Any) -> Tensor:
    """Numbers of an argument; one without an image is special everywhere."""
    places = places_in(x)
    return constant(SPECIAL, x.shape) if places is None else places


def thin(numbers: Tensor) -> Tensor:
    """The same with size 1 in every dimension along which it is one value repeated."""
    for dim, stride in enumerate(numbers.stride()):
        if stride == 0 and numbers.shape[dim] > 1:
            numbers = numbers.narrow(dim, 0, 1)
    return numbers
