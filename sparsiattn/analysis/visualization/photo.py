"""The image of `show`: the model's input, and the picture to display."""

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
    """The image as the model's input and as a picture, with the same size and crop.

    Args:
        patch: The model's patch.
        image: A path, a PIL image, a uint8 array or tensor, or a preprocessed (normalised) float
            tensor ``[C, H, W]`` or ``[1, C, H, W]``.
        image_size: Image size in pixels; needed if the patch has no image size.

    Returns:
        ``[1, C, H, W]`` with the model's device and dtype, and ``[H, W, 3]`` uint8.

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
    """Read the image if it is a path; return anything else unchanged."""
    if not isinstance(image, (str, PathLike)):
        return image
    from PIL import Image

    path = Path(image)
    if not path.is_file():
        raise DataError(f"no image file {str(path)!r}")
    try:
        with Image.open(path) as opened:
            return opened.convert(mode_of(channels))
    except Exception as error:  # PIL's plug-ins raise many kinds of errors for broken files
        raise DataError(f"{path} cannot be read as an image: {error}") from error


def pixels(image: Tensor, config: Any) -> Tensor:
    """Convert a normalised image to a picture.

    If the result is outside the range of colours, as the image was normalised in another way, the
    image is scaled to that range.

    Args:
        image: ``[C, H, W]``, normalised.
        config: The model's data config, with ``mean`` and ``std``.

    Returns:
        ``[H, W, 3]`` uint8.

    Raises:
        DataError: The image contains NaN or infinity.
    """
    mean, std = (torch.tensor(config[name]).view(-1, 1, 1) for name in ("mean", "std"))
    x = image.detach().float().cpu()
    colours = x * std + mean
    if not torch.isfinite(colours).all():
        raise DataError("the image must have finite values, but contains NaN or infinity")
    if colours.min() < -0.02 or colours.max() > 1.02:
        colours = (x - x.min()) / (x.max() - x.min()).clamp_min(1e-6)
    colours = colours[:3] if len(colours) >= 3 else colours[:1].expand(3, -1, -1)
    return (colours.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous()
