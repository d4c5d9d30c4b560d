"""What is done to an image before the model sees it, by timm's transforms."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
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
_OURS = {
    "input_size", "is_training", "use_prefetcher", "normalize", "separate", "naflex", "patch_size",
    "max_seq_len", "patchify", "patchify_channels_last", "patchify_flatten", "tf_preprocessing",
}  # fmt: skip
_CARD = ("mean", "std", "interpolation", "crop_pct", "crop_mode")
_EVAL = {*_CARD, "crop_border_pixels"}

Options = Mapping[str, Any]


@cache
def _transform_names() -> frozenset[str]:
    from timm.data import create_transform

    return frozenset(signature(create_transform).parameters) - _OURS


@cache
def _mixing_names() -> frozenset[str]:
    from timm.data import Mixup

    return frozenset(signature(Mixup).parameters) - {"num_classes", "multi_label"}


def check_options(options: Options) -> None:
    """Raise `UnknownName` for a key that neither timm's create_transform nor its Mixup takes."""
    known = _transform_names() | _mixing_names()
    for name in options:
        if name not in known:
            raise unknown("augment option", name, known)


def data_config(model: nn.Module, image_size: Any = None, options: Options | None = None) -> Any:
    """What timm calls the data config: input_size ``(C, H, W)``, mean, std, interpolation,
    crop_pct, crop_mode.

    The size is the one the model was built for (its ``pretrained_cfg`` may name another). The rest
    comes from ``options``, then ``pretrained_cfg``, then timm's defaults (ImageNet statistics),
    which transformers and torchvision models get, too. Below 96 pixels nothing is cropped away,
    unless ``options`` or a ``pretrained_cfg`` for that very size says so.

    >>> from sparsiattn.testing.hosts import tiny_vit
    >>> config = data_config(tiny_vit())
    >>> config["input_size"], config["crop_pct"]
    ((3, 32, 32), 1.0)
    """
    from timm.data import resolve_data_config

    options = options or {}
    card = getattr(unwrap(model), "pretrained_cfg", None)
    card = dict(card) if isinstance(card, Mapping) else {}
    channels, *sides = _image_shape(model, image_size)
    given = {name: options[name] for name in _CARD if options.get(name) is not None}
    if given.get("interpolation") == "random":  # of training alone
        del given["interpolation"]
    given["input_size"] = (channels, *sides)
    for name in ("mean", "std"):
        given[name] = _per_channel(name, given.get(name) or card.get(name), channels)
    config = resolve_data_config(given, pretrained_cfg=card, model=model)
    said = "crop_pct" in given or tuple(card.get("input_size", ()))[1:] == tuple(sides)
    if min(sides) < SMALL and not said:
        config["crop_pct"] = 1.0
    return config


def _per_channel(name: str, values: Any, channels: int) -> tuple[float, ...] | None:
    """One value per channel: a single one for all of them, and the mean of three for grey."""
    from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

    default = IMAGENET_DEFAULT_MEAN if name == "mean" else IMAGENET_DEFAULT_STD
    found = tuple(np.atleast_1d(np.asarray(values if values else default, dtype=float)).tolist())
    if len(found) == channels:
        return found
    if len(found) == 1 or channels == 1:
        return (sum(found) / len(found),) * channels
    raise InvalidOption(f"{name} must have one value or {channels}, got {list(found)}")


def _image_shape(model: nn.Module, image_size: Any) -> tuple[int, int, int]:
    """Channels, rows and columns of the images a model takes."""
    host = unwrap(model)
    adapters = (b for b in REGISTRY.all("backbones").values() if not b.why_not(host))
    shape = next((adapter.input_shape(host) for adapter in adapters), None)
    if shape is not None and len(shape) != 4:
        raise DataError(f"{type(host).__name__} takes input {shape[1:]}, not images (C, H, W)")
    if image_size is None and shape is None:
        raise DataError(f"{type(host).__name__} does not say its image size: pass image_size=")
    channels = 3 if shape is None else shape[1]
    if image_size is None:
        assert shape is not None
        return channels, shape[2], shape[3]
    sides = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if len(sides) != 2 or not all(type(side) is int and side > 0 for side in sides):
        raise InvalidOption(f"image_size must be pixels or (rows, columns), got {image_size!r}")
    return channels, sides[0], sides[1]


def transform(config: Any, training: bool, options: Options) -> Callable[[Any], Tensor]:
    """PIL image to normalised float32 ``[C, H, W]``.

    Training below 96 pixels shifts the image by up to an eighth of its side (padding with black)
    instead of cropping at random, as DeiT's code does for CIFAR, unless ``scale``, ``ratio`` or
    ``train_crop_mode`` is given.
    """
    from timm.data import create_transform
    from torchvision import transforms

    names = _transform_names() if training else _EVAL
    given = {name: value for name, value in options.items() if name in names}
    if not training or given.get("interpolation") is None:
        given["interpolation"] = config["interpolation"]
    for name in set(_CARD) - {"interpolation"}:
        given[name] = config[name]
    size = config["input_size"]
    try:
        made = create_transform(input_size=size, is_training=training, **given)
    except (AssertionError, ValueError, TypeError, KeyError, IndexError) as error:
        raise InvalidOption(
            f"timm's create_transform refuses {given}: {error or type(error).__name__}"
        ) from error
    crops = {"scale", "ratio", "train_crop_mode", "no_aug"}
    if training and min(size[1:]) < SMALL and not any(options.get(name) for name in crops):
        pad = [side // 8 for side in (size[2], size[1])]
        shift = transforms.RandomCrop(size[1:], padding=pad)
        made.transforms[:1] = [transforms.Resize(size[1:]), shift]
    return made  # type: ignore[no-any-return]


def mixing(options: Options, classes: int | None) -> Any:
    """timm's `Mixup` where an alpha or cutmix_minmax asks for it, else None."""
    from timm.data import Mixup

    given = {name: value for name, value in options.items() if name in _mixing_names()}
    on = ("mixup_alpha", "cutmix_alpha", "cutmix_minmax")
    if not any(given.get(name) for name in on):
        if given.get("label_smoothing"):
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
    return Mixup(**{"mixup_alpha": 0.0, **given}, num_classes=classes)


def head_size(model: nn.Module) -> int | None:
    """Number of classes a model tells apart, None where it does not say."""
    host = unwrap(model)
    own = getattr(host, "num_classes", None)
    if not isinstance(own, int) and "ForImageClassification" in type(host).__name__:
        own = getattr(getattr(host, "config", None), "num_labels", None)
    if own == 0:
        raise DataError(
            f"{type(host).__name__} has no head (num_classes=0), so it gives no classes: make it "
            "with timm.create_model(..., num_classes=...)"
        )
    return own if isinstance(own, int) else None


@contextmanager
def drawing(*key: int) -> Iterator[None]:
    """Python's, numpy's and torch's random numbers depend on the key alone inside the block, and
    go on afterwards as if it had not been."""
    number = int(np.random.SeedSequence(key).generate_state(1)[0])
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(number)
    np.random.seed(number)
    torch.default_generator.manual_seed(number)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])
