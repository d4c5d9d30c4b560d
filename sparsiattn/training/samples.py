"""Samples made of images and labels; deterministic for a given (seed, epoch)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from sparsiattn.errors import DataError
from sparsiattn.training.preprocess import seeded
from sparsiattn.training.sources import Source, mode_of

Sample = tuple[Tensor, int, tuple[int, ...]]
"""Image ``[C, H, W]``, label, and the position ``(epoch, index)``."""


@dataclass(frozen=True)
class Finish:
    """Turns an image and its label into a sample.

    Attributes:
        transform: Turns a PIL image into a tensor ``[C, H, W]``.
        channels: Number of image channels.
        classes: Number of classes of the model's head; None if unknown.
        seed: Seed of augmentation.
        training: Whether the transform is random.
        labels: Whether to read labels; if False, all labels are 0.
    """

    transform: Callable[[Any], Tensor]
    channels: int
    classes: int | None = None
    seed: int = 0
    training: bool = False
    labels: bool = True

    def seeded(self, where: tuple[int, ...]) -> AbstractContextManager[None]:
        """Seed the random numbers of one sample, also for a dataset's own transform."""
        return seeded(self.seed, *where) if self.training else nullcontext()

    def __call__(self, item: Any, name: str, where: tuple[int, ...]) -> Sample:
        pair = item if isinstance(item, (tuple, list)) else (item,)
        if self.labels and len(pair) < 2:
            raise DataError(f"{name}: items must be (image, label), got {type(item).__name__}")
        label = self._label(pair[1], name) if self.labels else 0
        return self._image(pair[0], name).float(), label, where

    def _image(self, image: Any, name: str) -> Tensor:
        from PIL import Image
        from torchvision.transforms.functional import to_pil_image

        if isinstance(image, Tensor) and image.is_floating_point() and image.dim() == 3:
            return image  # preprocessed by the dataset's own transform
        if isinstance(image, Tensor) and image.dtype == torch.uint8 and image.dim() == 3:
            image = to_pil_image(image)
        elif isinstance(image, np.ndarray) and image.dtype == np.uint8:
            image = Image.fromarray(image)
        if not isinstance(image, Image.Image):
            raise DataError(
                f"{name}: the image must be a PIL image or a tensor [C, H, W] (uint8, or float and "
                f"normalised), got {type(image).__name__}"
            )
        mode = mode_of(self.channels)
        return self.transform(image if image.mode == mode else image.convert(mode))

    def _label(self, label: Any, name: str) -> int:
        try:
            value = int(label)
        except (TypeError, ValueError) as error:
            raise DataError(f"{name}: the label must be a class index, got {label!r}") from error
        check_label(value, value, self.classes, name)
        return value


def check_labels(labels: Tensor, classes: int | None) -> None:
    """Raise `DataError` if class indices of a batch do not fit the head.

    Call it while the labels are on the CPU: on a GPU the check would synchronise, and torch's own
    check ends the process.
    """
    if labels.numel():
        check_label(int(labels.min()), int(labels.max()), classes, "a batch")


def check_label(low: int, high: int, classes: int | None, name: str) -> None:
    """Raise `DataError` if labels from ``low`` to ``high`` do not fit the head."""
    if low < 0:
        raise DataError(f"{name} has label {low}, but class indices start at 0: is it unlabelled?")
    if classes is not None and high >= classes:
        raise DataError(
            f"{name} has label {high}, but the model's head has {classes} classes (0 to "
            f"{classes - 1}): create a model with a matching head, timm.create_model(..., "
            f"num_classes={high + 1} or more), or pass the data it was made for"
        )


class Samples(Dataset[Sample]):
    """Samples by ``(epoch, index)``."""

    def __init__(self, source: Source, finish: Finish) -> None:
        self.source, self.finish = source, finish

    def __len__(self) -> int:
        return len(self.source.items)

    def __getitem__(self, where: tuple[int, int]) -> Sample:
        index = where[1]
        with self.finish.seeded(where):
            return self.finish(self.source.items[index], self.source.name(index), where)


class SampleStream(IterableDataset[Sample]):
    """Samples in the order of the source."""

    def __init__(self, inner: Any, finish: Finish, share: tuple[int, int], workers: int) -> None:
        self.inner, self.finish, self.share, self.epoch = inner, finish, share, 0
        reader: Any = getattr(inner, "reader", None)
        if hasattr(reader, "dist_num_replicas"):
            # timm's readers would divide streams among processes, and repeat or lose images
            reader.dist_rank, reader.dist_num_replicas = 0, 1
        if hasattr(inner, "set_loader_cfg"):
            inner.set_loader_cfg(num_workers=workers)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, which determines order and augmentation."""
        self.epoch = epoch
        if hasattr(self.inner, "set_epoch"):
            self.inner.set_epoch(epoch)

    def __len__(self) -> int:
        count = len(self.inner)
        if not count:
            raise TypeError("the number of images in this stream is not known")
        return -(-count // self.share[1])

    def __iter__(self) -> Iterator[Sample]:
        worker = getattr(get_worker_info(), "id", 0)
        rank, world = self.share
        for count, item in islice(enumerate(self.inner), rank, None, world):
            where = (self.epoch, worker, count)
            with self.finish.seeded(where):
                sample = self.finish(item, f"image {count} of the stream", where)
            yield sample
