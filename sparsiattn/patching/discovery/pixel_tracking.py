"""Tracks in a dry run from which pixel of the image each token comes.

A meta tensor carries a second tensor of the same shape (`places_in`), which holds for every element
the number of the pixel that it comes from. Operations that move data also move these numbers. A
convolution passes on the number at the centre of its window, a linear layer that of its row.
Anything without a rule is `UNKNOWN`, never a guess.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

from sparsiattn.patching.discovery.meta_cache import Recalled, taken_apart
from sparsiattn.patching.discovery.pixel_numbers import (
    PLACES,
    UNKNOWN,
    constant,
    places_in,
    thin,
)
from sparsiattn.patching.discovery.place_rules import RULES, pointwise

Tally = Callable[[Any, Any, Any, Any], None]


class PixelNumbers:
    """Attaches pixel numbers to the images among a dry run's inputs.

    Args:
        inputs: Arguments and keyword arguments. Images are floating-point tensors of at least four
            dimensions, with rows and columns last.

    Attributes:
        images: The first pixel number and the shape of every image.
    """

    def __init__(self, inputs: Any) -> None:
        self.images: list[tuple[int, tuple[int, ...]]] = []
        start = 0
        for tensor in tree_leaves(inputs):
            if isinstance(tensor, Tensor) and tensor.dim() >= 4 and tensor.is_floating_point():
                self.images.append((start, tuple(tensor.shape)))
                start += _number(tensor, start)

    def of_one_image(
        self, places: Sequence[Tensor | None]
    ) -> tuple[list[Tensor | None], tuple[int, ...]]:
        """Pixel numbers relative to their image, and the shape of that image.

        None for all if they belong to several images, or to none.
        """
        ranges = [_range(x) for x in places if x is not None]
        ranges = [(low, high) for low, high in ranges if high >= 0]
        for start, shape in self.images if ranges else ():
            end = start + torch.Size(shape).numel()
            if all(start <= low and high < end for low, high in ranges):
                return [x if x is None else _counted_from(start, x) for x in places], shape
        return [None] * len(places), ()


def _range(numbers: Tensor) -> tuple[int, int]:
    """The lowest and the highest pixel number; the highest is negative if there is none."""
    numbers = thin(numbers)
    if not numbers.numel():
        return 0, UNKNOWN
    highest = numbers.max()
    return int(torch.where(numbers >= 0, numbers, highest).min()), int(highest)


def _counted_from(start: int, numbers: Tensor) -> Tensor:
    small = thin(numbers)
    return torch.where(small >= 0, small - start, small).expand(numbers.shape)


def _number(image: Tensor, start: int) -> int:
    """Number an image's pixels from ``start``; returns how many numbers were used.

    In an image ``[B, C, H, W]``, all channels of a pixel have the same number.
    """
    shape = (image.shape[0], 1, *image.shape[2:]) if image.dim() == 4 else tuple(image.shape)
    count = torch.Size(shape).numel()
    numbers = torch.arange(start, start + count, dtype=torch.int32, device="cpu")
    setattr(image, PLACES, numbers.view(shape).expand(image.shape))
    return count


@contextmanager
def tracking_places(tally: Tally | None = None) -> Iterator[None]:
    """Context manager in which operators on meta tensors carry pixel numbers along.

    Args:
        tally: Called with every operator, its arguments, keyword arguments and result.
    """
    with _TrackPlaces(tally):
        yield


class _TrackPlaces(Recalled):
    """Applies `RULES` to every operator that takes a tensor with pixel numbers.

    It also recalls cached results, since each additional mode slows down every operator. Pixel
    numbers are cached, too, since the blocks of a transformer repeat the same operations on them.
    """

    def __init__(self, tally: Tally | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._tally = tally
        self._known: dict[Any, Sequence[Tensor | None]] = {}
        self._kept: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = taken_apart(self, func, args, kwargs)
        if out is not NotImplemented:
            return out
        out = self.answer(func, args, kwargs)
        if self._tally is not None:
            self._tally(func, args, kwargs, out)
        carried: list[Tensor] = []
        key = (func, _key(args, carried), _key(kwargs, carried))
        if carried:
            places = self._known.get(key)
            if places is None or func.overloadpacket is torch.ops.aten.copy_:
                places = _places_of(func, args, kwargs, out)
                # keys contain ids of these tensors, which must therefore stay alive
                self._known[key] = places
                self._kept += carried
            results = out if isinstance(out, (tuple, list)) else (out,)
            for tensor, numbers in zip(results, places, strict=False):
                if isinstance(tensor, Tensor):
                    _attach(tensor, numbers)
        return out


def _key(value: Any, carried: list[Tensor]) -> Any:
    """The cache key of an operator's arguments; pixel numbers in them are added to ``carried``."""
    if isinstance(value, Tensor):
        numbers = places_in(value)
        if numbers is not None:
            carried.append(numbers)
            return id(numbers)
        # a tensor with values is its own key: tensors hash by id, and lookup compares ids first
        return tuple(value.shape) if value.is_meta else value
    if isinstance(value, (list, tuple)):
        return tuple(_key(item, carried) for item in value)
    if isinstance(value, dict):
        return tuple((name, _key(item, carried)) for name, item in value.items())
    return value


def _attach(tensor: Tensor, numbers: Tensor | None) -> None:
    if numbers is None or numbers.shape != tensor.shape:
        numbers = constant(UNKNOWN, tensor.shape)
    setattr(tensor, PLACES, numbers)


def _places_of(func: Any, args: Any, kwargs: Any, out: Any) -> Sequence[Tensor | None]:
    """Pixel numbers of each result of an operator; None where they are not known."""
    rule = RULES.get(func.overloadpacket)
    if rule is None and torch.Tag.pointwise in func.tags:
        rule = pointwise
    if rule is None:
        return [None] * len(tree_leaves(out))
    try:
        with _disable_current_modes(), torch._C.DisableTorchFunction():
            places = rule(func, args, kwargs, out)
    except (RuntimeError, TypeError, ValueError, IndexError):
        return [None] * len(tree_leaves(out))  # the rule does not cover this form of the operator
    return places if isinstance(places, (tuple, list)) else (places,)
