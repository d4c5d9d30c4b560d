"""Pixel numbers that meta tensors carry along; see `pixel_tracking`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

UNKNOWN = -1
"""Instead of a pixel number: the element depends on unknown pixels of the image."""
SPECIAL = -2
"""Instead of a pixel number: the element does not depend on the image (class tokens, registers)."""
PADDING = -3
"""Instead of a pixel number: the element pads the image to fill a window."""

PLACES = "_sparsiattn_places"


def places_in(tensor: Tensor) -> Tensor | None:
    """Pixel numbers in the tensor's shape (int32 on the CPU); None if no image is tracked in it."""
    return getattr(tensor, PLACES, None)


def constant(value: int, shape: Sequence[int]) -> Tensor:
    return torch.tensor(value, dtype=torch.int32, device="cpu").expand(tuple(shape))


def numbers_of(x: Any) -> Tensor:
    """Pixel numbers of an argument; without an image, `SPECIAL` everywhere."""
    places = places_in(x)
    return constant(SPECIAL, x.shape) if places is None else places


def thin(numbers: Tensor) -> Tensor:
    """The same numbers with size 1 in every dimension of stride 0."""
    for dim, stride in enumerate(numbers.stride()):
        if stride == 0 and numbers.shape[dim] > 1:
            numbers = numbers.narrow(dim, 0, 1)
    return numbers
