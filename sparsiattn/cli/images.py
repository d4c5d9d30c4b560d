"""What commands run models on: images that are read, or noise."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from sparsiattn.errors import InvalidOption


@dataclass
class Placed:
    """Batches of a loader on a model's device and in its precision.

    Attributes:
        batches: Pairs of images and labels; labels are left out.
        device: Of the model.
        dtype: Of the model.
    """

    batches: Any
    device: Any
    dtype: Any

    def set_epoch(self, epoch: int) -> None:
        """Which order comes next."""
        self.batches.set_epoch(epoch)

    def __iter__(self) -> Iterator[Any]:
        for images, _ in self.batches:
            yield images.to(self.device, self.dtype)


def unlabelled(
    data: str, model: Any, image_size: int | None, workers: int = 0, **options: Any
) -> Placed:
    """Batches of images, read as the model takes them.

    Args:
        data: Folder or .tar; labels do not matter.
        model: Says how images are read, and where they go.
        image_size: Pixels; what the model was built for if None.
        workers: Processes that read.
        **options: Others of `sparsiattn.training.data.loader`.
    """
    from sparsiattn.training.data import loader

    batches = loader(data, model, labels=False, image_size=image_size, workers=workers, **options)
    like = next(model.parameters())
    return Placed(batches, like.device, like.dtype)


def noise(model: Any, size: int | None, batch: int) -> Any:
    """A batch of noise of the size the model takes, of its own precision and device."""
    import torch

    like = next(model.parameters())
    images = torch.randn(
        batch, *image_shape(model, size)[1:], generator=torch.Generator().manual_seed(0)
    )
    return images.to(like.device, like.dtype)


def image_shape(model: Any, size: int | None) -> tuple[int, ...]:
    """Shape of one image: of the pixels asked for, else of those the model is built for."""
    from sparsiattn.patching.discovery.backbone import backbone_of

    shape = backbone_of(model).input_shape(model)
    if shape is None and size is None:
        raise InvalidOption(
            f"{type(model).__name__} does not say its image size: give --image-size"
        )
    shape = shape or (1, 3, 0, 0)
    return shape if size is None else (*shape[:-2], size, size)
