"""The image that is shown: what the model takes, and what people look at."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsiattn.errors import DataError
from sparsiattn.patching import Patch
from sparsiattn.training import data_config, image_transform
from sparsiattn.training.samples import Finish
from sparsiattn.training.sources import mode_of


def photo(patch: Patch, image: Any, image_size: Any = None) -> tuple[Tensor, Tensor]:
    """The image for the model, and for people: resized and cropped alike.

    Args:
        patch: Of the model that takes the image.
        image: A path, a PIL image, a uint8 array or tensor, or a finished (normalised) float tensor
            ``[C, H, W]`` or ``[1, C, H, W]``.
        image_size: Pixels, where the patch does not know the size of its input.

    Returns:
        ``[1, C, H, W]`` at the model's device and dtype, and ``[H, W, 3]`` uint8.

    Raises:
        DataError: The image cannot be read, is a batch, or does not fit the model.
    """
    shape = patch.input_shape
    if image_size is None and len(shape) == 4:
        image_size = shape[2], shape[3]
    config = data_config(patch.model, image_size)
    channels = shape[1] if len(shape) == 4 else config["input_size"][0]
    finish = Finish(image_transform(config, False, {}), channels, labels=False)
    image = _read(image, channels)
    if isinstance(image, Tensor) and image.dim() == 4:
        if len(image) != 1:
            raise DataError(f"show() takes one image, got a batch of {len(image)}: pass images[i]")
        image = image[0]
    tensor, _, _ = finish(image, "image", ())
    if tensor.dim() != 3 or tensor.shape[0] != channels:
        raise DataError(
            f"the model takes images [{channels}, H, W], got a tensor {list(tensor.shape)}"
        )
    weight = next(patch.model.parameters(), torch.empty(0))
    return tensor[None].to(weight.device, weight.dtype), pixels(tensor, config)


def _read(image: Any, channels: int) -> Any:
    """The image of a path; anything else as it is."""
    if not isinstance(image, (str, PathLike)):
        return image
    from PIL import Image

    path = Path(image)
    if not path.is_file():
        raise DataError(f"no image file {str(path)!r}")
    try:
        with Image.open(path) as opened:
            return opened.convert(mode_of(channels))
    except Exception as error:  # PIL's plug-ins raise whatever a broken file makes them raise
        raise DataError(f"{path} cannot be read as an image: {error}") from error


def pixels(image: Tensor, config: Any) -> Tensor:
    """A normalised image as people see it.

    One that was normalised in another way, so that it leaves the range of colours, is stretched
    over that range.

    Args:
        image: ``[C, H, W]``, normalised.
        config: The model's data config, with ``mean`` and ``std``.

    Returns:
        ``[H, W, 3]`` uint8.

    Raises:
        DataError: The image holds NaN or infinity.
    """
    mean, std = (torch.tensor(config[name]).view(-1, 1, 1) for name in ("mean", "std"))
    x = image.detach().float().cpu()
    colours = x * std + mean
    if not torch.isfinite(colours).all():
        raise DataError("the image holds NaN or infinity")
    if colours.min() < -0.02 or colours.max() > 1.02:
        colours = (x - x.min()) / (x.max() - x.min()).clamp_min(1e-6)
    colours = colours[:3] if len(colours) >= 3 else colours[:1].expand(3, -1, -1)
    return (colours.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous()
