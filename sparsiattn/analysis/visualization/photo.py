"""The image that is shown: what the model takes, and what people look at."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsiattn.errors import DataError
from sparsiattn.runtime.handle import Patch
from sparsiattn.training.preprocess import data_config, image_transform
from sparsiattn.training.sources import Finish, mode_of


def photo(patch: Patch, image: Any, image_size: Any = None) -> tuple[Tensor, Tensor]:
    """``([1, C, H, W]`` for the model, ``[H, W, 3]`` uint8 to look at)``.

    image: a path, a PIL image, a uint8 array or tensor, or a finished (normalised) float tensor
    ``[C, H, W]`` or ``[1, C, H, W]``. What is looked at is what the model sees: resized and
    cropped.
    """
    shape = patch.input_shape
    if image_size is None and len(shape) == 4:
        image_size = shape[2], shape[3]
    config = data_config(patch.model, image_size)
    channels = shape[1] if len(shape) == 4 else config["input_size"][0]
    finish = Finish(image_transform(config, False, {}), channels, labels=False)
    given = _read(image, channels)
    if isinstance(given, Tensor) and given.dim() == 4:
        if len(given) != 1:
            raise DataError(f"show() takes one image, got a batch of {len(given)}: pass images[i]")
        given = given[0]
    tensor, _, _ = finish(given, "image", ())
    if tensor.dim() != 3 or tensor.shape[0] != channels:
        raise DataError(
            f"the model takes images [{channels}, H, W], got a tensor {list(tensor.shape)}"
        )
    like = next(patch.model.parameters(), torch.empty(0))
    return tensor[None].to(like.device, like.dtype), pixels(tensor, config)


def _read(image: Any, channels: int) -> Any:
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
    """A normalised ``[C, H, W]`` as ``[H, W, 3]`` uint8. One that was normalised in another way, so
    that it leaves the range of colours, is stretched over it."""
    mean, std = (torch.tensor(config[name]).view(-1, 1, 1) for name in ("mean", "std"))
    x = image.detach().float().cpu()
    colours = x * std + mean
    if not torch.isfinite(colours).all():
        raise DataError("the image holds NaN or infinity")
    if colours.min() < -0.02 or colours.max() > 1.02:
        colours = (x - x.min()) / (x.max() - x.min()).clamp_min(1e-6)
    colours = colours[:3] if len(colours) >= 3 else colours[:1].expand(3, -1, -1)
    return (colours.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous()
