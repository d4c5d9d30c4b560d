"""The images that a setting is judged by: batches of one size on the model's device."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparsiattn.errors import DataError, InvalidOption

MOST = 256
"""Images that are read at most."""
PASSES = 150
"""Forward passes that should fit into the budget."""
WANTED = (
    "images must be a batch [B, C, H, W] (or of videos or views, with one more axis) of floats, or "
    "an iterable of such batches, alone or with labels"
)


def read_images(images: Any, model: nn.Module, has_time: Callable[[], bool]) -> tuple[Tensor, int]:
    """Up to `MOST` images ``[B, C, H, W]`` on the model's device and in its precision,
    and the length of the first batch.

    Args:
        images: A batch, or a loader of batches or of pairs of images and labels.
        model: Takes them.
        has_time: Whether to read on.

    Raises:
        DataError: There are none, or they are none, or not of one size.
    """
    read: list[Tensor] = []
    count = 0
    for batch in _batches(images):
        if read and batch.shape[1:] != read[0].shape[1:]:
            raise DataError(
                f"images must be of one size, got {_shape(read[0])} and {_shape(batch)}: resize "
                "them, or give those of one size"
            )
        read.append(batch)
        count += len(batch)
        if count >= MOST or not has_time():
            break
    if not count:
        raise DataError(f"there are no images: {WANTED}")
    like = next((p for p in model.parameters() if p.is_floating_point()), None)
    together = torch.cat(read)[:MOST].detach()
    placed = together if like is None else together.to(like.device, like.dtype)
    return placed, len(read[0])


def in_batches(images: Tensor, size: int) -> list[Tensor]:
    """Batches of so many images each; a rest that fills none is left out.

    >>> [len(batch) for batch in in_batches(torch.zeros(5, 3, 8, 8), 2)]
    [2, 2]
    """
    size = min(size, len(images))
    return list(images[: len(images) // size * size].split(size))


def check_size(size: object) -> int | None:
    """The images of one forward pass, as the user wants them.

    Raises:
        InvalidOption: That is no positive int.
    """
    if size is None or (type(size) is int and size >= 1):
        return size
    raise InvalidOption(f"batch_size must be None or an int >= 1, got {size!r}")


def fitting_size(seconds: float, given: int, budget_s: float) -> int:
    """Images of a forward pass: as many as were given, if some hundred such passes fit.

    Args:
        seconds: What one image takes.
        given: Images of the first batch.
        budget_s: Seconds in all.
    """
    fitting = max(1, int(budget_s / PASSES / max(seconds, 1e-9)))
    # else a power of two, as people run them
    return given if fitting >= given else 1 << (fitting.bit_length() - 1)


def _batches(images: Any) -> Iterator[Tensor]:
    if isinstance(images, Tensor):
        images = [images]
    if isinstance(images, (str, bytes, Mapping)) or not isinstance(images, Iterable):
        raise DataError(f"{WANTED}; got {type(images).__name__}")
    for batch in itertools.chain(images):
        tensor = _images_of(batch)
        if not _is_batch(tensor):
            got = type(tensor).__name__
            if isinstance(tensor, Tensor):
                got = f"{tensor.dtype} of shape {_shape(tensor)}".removeprefix("torch.")
                got += "; of one image make a batch: image[None]" if tensor.dim() == 3 else ""
            raise DataError(f"{WANTED}; got {got}")
        if len(tensor):
            yield tensor


def _is_batch(batch: Any) -> bool:
    return isinstance(batch, Tensor) and batch.dim() in (4, 5) and batch.is_floating_point()


def _images_of(batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return batch.get("pixel_values", batch)
    return batch[0] if isinstance(batch, (tuple, list)) and batch else batch


def _shape(images: Tensor) -> str:
    return f"[{', '.join(map(str, images.shape))}]"
