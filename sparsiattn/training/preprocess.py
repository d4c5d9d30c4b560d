"""Preprocessing and augmentation of images with timm's transforms."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from inspect import signature
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sparsiattn.errors import DataError, InvalidOption, unknown
from sparsiattn.registry.registry import REGISTRY
from sparsiattn.runtime.patch_state import unwrap

SMALL = 96  # pixels; the usual crops remove too much of smaller images
_OURS = (
    "input_size is_training use_prefetcher normalize separate naflex patch_size max_seq_len "
    "patchify patchify_channels_last patchify_flatten tf_preprocessing num_classes multi_label"
)
"""Options of timm's create_transform and Mixup that the loader sets itself or does not support."""
_CONFIG = ("mean", "std", "interpolation", "crop_pct", "crop_mode")
_EVAL = {*_CONFIG, "crop_border_pixels"}

Options = Mapping[str, Any]


@cache
def _option_names(name: str) -> frozenset[str]:
    """Options of timm's ``create_transform`` or ``Mixup`` that users may set."""
    import timm.data

    return frozenset(signature(getattr(timm.data, name)).parameters).difference(_OURS.split())


def check_options(options: Options) -> None:
    """Raise `UnknownName` for a key that neither timm's create_transform nor its Mixup takes."""
    known = _option_names("create_transform") | _option_names("Mixup")
    for name in options:
        if name not in known:
            raise unknown("augment option", name, known)


def data_config(model: nn.Module, image_size: Any = None, options: Options | None = None) -> Any:
    """The data config of a model, as timm calls it.

    The size is the one that the model was built for, which may differ from ``pretrained_cfg``. The
    rest comes from ``options``, then ``pretrained_cfg``, then timm's defaults (ImageNet
    statistics), which also apply to models of transformers and torchvision. Images below 96 pixels
    are not cropped, unless ``options`` or a ``pretrained_cfg`` for the same size sets a crop.

    Args:
        model: The model that will get the images.
        image_size: Pixels, or ``(rows, columns)``; None for the size that the model was built for.
        options: Options by timm's names.

    Returns:
        A dict with input_size ``(C, H, W)``, mean, std, interpolation, crop_pct and crop_mode.

    Raises:
        DataError: The model does not take images, or its image size is unknown.
        InvalidOption: A size or a statistic is invalid.

    >>> from sparsiattn.testing.hosts import tiny_vit
    >>> config = data_config(tiny_vit())
    >>> config["input_size"], config["crop_pct"]
    ((3, 32, 32), 1.0)
    """
    from timm.data import resolve_data_config

    options = options or {}
    pretrained = getattr(unwrap(model), "pretrained_cfg", None)
    pretrained = dict(pretrained) if isinstance(pretrained, Mapping) else {}
    channels, *sides = _image_shape(model, image_size)
    config = {name: options[name] for name in _CONFIG if options.get(name) is not None}
    if config.get("interpolation") == "random":  # used in training only
        del config["interpolation"]
    config["input_size"] = (channels, *sides)
    for name in ("mean", "std"):
        config[name] = _per_channel(name, config.get(name) or pretrained.get(name), channels)
    same_size = tuple(pretrained.get("input_size", ()))[1:] == tuple(sides)
    crops = "crop_pct" in config or same_size
    config = resolve_data_config(config, pretrained_cfg=pretrained, model=model)
    if min(sides) < SMALL and not crops:
        config["crop_pct"] = 1.0
    return config


@dataclass(frozen=True)
class Preprocessing:
    """The preprocessing of images for evaluation.

    Attributes:
        size: Rows and columns of the model's input, in pixels.
        interpolation: Name of the interpolation filter.
        crop_pct: Share of the resized image's side that is kept.
        crop_mode: How the image is cropped: ``"center"``, ``"squash"`` or ``"border"``.
        mean: Mean per channel that is subtracted, for values from 0 to 1.
        std: Standard deviation per channel that the result is divided by.

    >>> print(Preprocessing((224, 224), "bicubic", 0.9, "center", (0.5,) * 3, (0.5,) * 3))
    224 x 224 pixels, bicubic, crop 0.9 (center), mean (0.5, 0.5, 0.5), std (0.5, 0.5, 0.5)
    """

    size: tuple[int, int]
    interpolation: str
    crop_pct: float
    crop_mode: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, config: Any) -> Preprocessing:
        """The preprocessing in a result of `data_config`."""
        _, rows, columns = config["input_size"]
        return cls((rows, columns), **{name: config[name] for name in _CONFIG})

    def __str__(self) -> str:
        mean, std = (
            ", ".join(f"{value:.4g}" for value in values) for values in (self.mean, self.std)
        )
        crop = f"crop {self.crop_pct:.4g} ({self.crop_mode})"
        size = " x ".join(map(str, self.size))
        return f"{size} pixels, {self.interpolation}, {crop}, mean ({mean}), std ({std})"


def _per_channel(name: str, values: Any, channels: int) -> tuple[float, ...] | None:
    """One value per channel; a single value is repeated, and grey images get the mean of three."""
    from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

    default = IMAGENET_DEFAULT_MEAN if name == "mean" else IMAGENET_DEFAULT_STD
    numbers = tuple(np.atleast_1d(np.asarray(values if values else default, dtype=float)).tolist())
    if len(numbers) == channels:
        return numbers
    if len(numbers) == 1 or channels == 1:
        return (sum(numbers) / len(numbers),) * channels
    raise InvalidOption(f"{name} must have one value or {channels}, got {list(numbers)}")


def _image_shape(model: nn.Module, image_size: Any) -> tuple[int, int, int]:
    """Channels, rows and columns of a model's images."""
    host = unwrap(model)
    adapters = (b for b in REGISTRY.all("backbones").values() if not b.why_not(host))
    shape = next((adapter.input_shape(host) for adapter in adapters), None)
    if shape is not None and len(shape) != 4:
        raise DataError(f"{type(host).__name__} takes inputs {shape[1:]}, not images (C, H, W)")
    if image_size is None:
        if shape is None:
            raise DataError(
                f"the image size of {type(host).__name__} is not known: pass image_size="
            )
        return shape[1], shape[2], shape[3]
    sides = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if len(sides) != 2 or not all(type(side) is int and side > 0 for side in sides):
        raise InvalidOption(f"image_size must be pixels or (rows, columns), got {image_size!r}")
    return 3 if shape is None else shape[1], sides[0], sides[1]


def image_transform(config: Any, training: bool, options: Options) -> Callable[[Any], Tensor]:
    """The transform of a PIL image to normalised float32 ``[C, H, W]``.

    In training, images below 96 pixels are shifted by up to an eighth of their side (padded with
    black) instead of cropped at random, as DeiT's code does for CIFAR, unless ``scale``, ``ratio``
    or ``train_crop_mode`` is set.

    Args:
        config: The result of `data_config`.
        training: Whether to augment.
        options: Options of timm's `create_transform`; without ``training`` only those of
            preprocessing have an effect.

    Raises:
        InvalidOption: timm does not accept the options.

    >>> from PIL import Image
    >>> from sparsiattn.testing.hosts import tiny_vit
    >>> transform = image_transform(data_config(tiny_vit()), training=False, options={})
    >>> transform(Image.new("RGB", (64, 48))).shape
    torch.Size([3, 32, 32])
    """
    from timm.data import create_transform
    from torchvision import transforms

    names = _option_names("create_transform") if training else _EVAL
    settings = {name: value for name, value in options.items() if name in names}
    if not training or settings.get("interpolation") is None:
        settings["interpolation"] = config["interpolation"]
    settings |= {name: config[name] for name in _CONFIG if name != "interpolation"}
    channels, rows, columns = config["input_size"]
    try:
        transform = create_transform((channels, rows, columns), is_training=training, **settings)
    except (AssertionError, ValueError, TypeError, KeyError, IndexError) as error:
        raise InvalidOption(
            f"timm's create_transform does not accept {settings}: {error or type(error).__name__}"
        ) from error
    crops = any(options.get(name) for name in ("scale", "ratio", "train_crop_mode", "no_aug"))
    if training and min(rows, columns) < SMALL and not crops:
        shift = transforms.RandomCrop((rows, columns), padding=[columns // 8, rows // 8])
        transform.transforms[:1] = [transforms.Resize((rows, columns)), shift]
    return transform  # type: ignore[no-any-return]


def mixes(options: Options) -> bool:
    """Whether the options enable mixup or cutmix."""
    return any(map(options.get, ("mixup_alpha", "cutmix_alpha", "cutmix_minmax")))


def mixing(options: Options, classes: int | None) -> Any:
    """timm's `Mixup` if the options enable mixup or cutmix, else None."""
    from timm.data import Mixup

    settings = {name: value for name, value in options.items() if name in _option_names("Mixup")}
    if not mixes(options):
        if settings.get("label_smoothing"):
            raise InvalidOption(
                "label_smoothing in augment belongs to mixup and cutmix, and both are off: set "
                "mixup_alpha or cutmix_alpha, or smooth the labels in the loss"
            )
        return None
    if classes is None:
        raise InvalidOption(
            "mixup and cutmix need the number of classes, but the model has neither num_classes "
            "nor config.num_labels: set one of them"
        )
    return Mixup(**{"mixup_alpha": 0.0, **settings}, num_classes=classes)


def head_size(model: nn.Module) -> int | None:
    """Number of a model's classes; None if it is not known."""
    host = unwrap(model)
    classes = getattr(host, "num_classes", None)
    if not isinstance(classes, int) and "ForImageClassification" in type(host).__name__:
        classes = getattr(getattr(host, "config", None), "num_labels", None)
    if classes == 0:
        raise DataError(
            f"{type(host).__name__} has no head (num_classes=0), so it gives no classes: create "
            "it with timm.create_model(..., num_classes=...)"
        )
    return classes if isinstance(classes, int) else None


@contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Seed Python, numpy and torch by a key inside the block; restore their state afterwards."""
    seed = int(np.random.SeedSequence(key).generate_state(1)[0])
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed)
    # `torch.manual_seed` would also seed the GPUs, whose state is not restored
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
