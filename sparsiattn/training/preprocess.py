"""What is done to an image before the model sees it, by timm's transforms."""

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

SMALL = 96  # pixels: below it the usual crops cost more of the image than they gain
_OURS = (
    "input_size is_training use_prefetcher normalize separate naflex patch_size max_seq_len "
    "patchify patchify_channels_last patchify_flatten tf_preprocessing num_classes multi_label"
)
"""Options of timm's create_transform and Mixup that the loader sets itself, or has no use for."""
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
    """What timm calls the data config of a model.

    The size is the one the model was built for (its ``pretrained_cfg`` may name another). The rest
    comes from ``options``, then ``pretrained_cfg``, then timm's defaults (ImageNet statistics),
    which transformers and torchvision models get, too. Below 96 pixels nothing is cropped away,
    unless ``options`` or a ``pretrained_cfg`` for that very size says so.

    Args:
        model: Takes the images.
        image_size: Pixels, or (rows, columns), where the model should get another size.
        options: By timm's names.

    Returns:
        input_size ``(C, H, W)``, mean, std, interpolation, crop_pct and crop_mode.

    Raises:
        DataError: The model does not take images, or does not say its size.
        InvalidOption: A size or a statistic is wrong.

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
    if config.get("interpolation") == "random":  # of training alone
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
    """How images were read for evaluation.

    Attributes:
        size: Rows and columns of what the model gets, in pixels.
        interpolation: Name of the filter.
        crop_pct: Share of the resized image's side that is kept.
        crop_mode: Where it is cut out: ``"center"``, ``"squash"`` or ``"border"``.
        mean: Subtracted, by channel, of values in 0 to 1.
        std: Divided by, likewise.

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
        """Of the result of `data_config`."""
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
    """One value per channel: a single one for all of them, and the mean of three for grey."""
    from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

    default = IMAGENET_DEFAULT_MEAN if name == "mean" else IMAGENET_DEFAULT_STD
    numbers = tuple(np.atleast_1d(np.asarray(values if values else default, dtype=float)).tolist())
    if len(numbers) == channels:
        return numbers
    if len(numbers) == 1 or channels == 1:
        return (sum(numbers) / len(numbers),) * channels
    raise InvalidOption(f"{name} must have one value or {channels}, got {list(numbers)}")


def _image_shape(model: nn.Module, image_size: Any) -> tuple[int, int, int]:
    """Channels, rows and columns of the images a model takes."""
    host = unwrap(model)
    adapters = (b for b in REGISTRY.all("backbones").values() if not b.why_not(host))
    shape = next((adapter.input_shape(host) for adapter in adapters), None)
    if shape is not None and len(shape) != 4:
        raise DataError(f"{type(host).__name__} takes input {shape[1:]}, not images (C, H, W)")
    if image_size is None:
        if shape is None:
            raise DataError(f"{type(host).__name__} does not say its image size: pass image_size=")
        return shape[1], shape[2], shape[3]
    sides = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if len(sides) != 2 or not all(type(side) is int and side > 0 for side in sides):
        raise InvalidOption(f"image_size must be pixels or (rows, columns), got {image_size!r}")
    return 3 if shape is None else shape[1], sides[0], sides[1]


def image_transform(config: Any, training: bool, options: Options) -> Callable[[Any], Tensor]:
    """PIL image to normalised float32 ``[C, H, W]``.

    Training below 96 pixels shifts the image by up to an eighth of its side (padding with black)
    instead of cropping at random, as DeiT's code does for CIFAR, unless ``scale``, ``ratio`` or
    ``train_crop_mode`` is set.

    Args:
        config: The result of `data_config`.
        training: Whether to augment.
        options: Of timm's `create_transform`; outside training only those that say how an image is
            read count.

    Raises:
        InvalidOption: timm refuses the options.
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
            f"timm's create_transform refuses {settings}: {error or type(error).__name__}"
        ) from error
    crops = any(options.get(name) for name in ("scale", "ratio", "train_crop_mode", "no_aug"))
    if training and min(rows, columns) < SMALL and not crops:
        shift = transforms.RandomCrop((rows, columns), padding=[columns // 8, rows // 8])
        transform.transforms[:1] = [transforms.Resize((rows, columns)), shift]
    return transform  # type: ignore[no-any-return]


def mixes(options: Options) -> bool:
    """Whether options switch mixup or cutmix on."""
    return any(map(options.get, ("mixup_alpha", "cutmix_alpha", "cutmix_minmax")))


def mixing(options: Options, classes: int | None) -> Any:
    """timm's `Mixup` where an alpha or cutmix_minmax asks for it, else None."""
    from timm.data import Mixup

    settings = {name: value for name, value in options.items() if name in _option_names("Mixup")}
    if not mixes(options):
        if settings.get("label_smoothing"):
            raise InvalidOption(
                "label_smoothing in augment belongs to mixup and cutmix, and both are off: give "
                "mixup_alpha or cutmix_alpha, or smooth the labels in the loss"
            )
        return None
    if classes is None:
        raise InvalidOption(
            "mixup and cutmix need the number of classes, and the model does not say it "
            "(no num_classes, no config.num_labels)"
        )
    return Mixup(**{"mixup_alpha": 0.0, **settings}, num_classes=classes)


def head_size(model: nn.Module) -> int | None:
    """Number of classes a model tells apart, None where it does not say."""
    host = unwrap(model)
    classes = getattr(host, "num_classes", None)
    if not isinstance(classes, int) and "ForImageClassification" in type(host).__name__:
        classes = getattr(getattr(host, "config", None), "num_labels", None)
    if classes == 0:
        raise DataError(
            f"{type(host).__name__} has no head (num_classes=0), so it gives no classes: make it "
            "with timm.create_model(..., num_classes=...)"
        )
    return classes if isinstance(classes, int) else None


@contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Python's, numpy's and torch's random numbers depend on the key alone inside the block, and
    go on afterwards as if it had not been."""
    seed = int(np.random.SeedSequence(key).generate_state(1)[0])
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed)
    # `torch.manual_seed` would seed the GPUs as well, which are not restored
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
