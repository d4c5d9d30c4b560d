"""The origin of a model, plain data that lets a saved patch create its host again."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from sparsiattn.errors import InvalidOption
from sparsiattn.runtime.site_runtime import PLANNER
from sparsiattn.serialization.fingerprint import fingerprint

ORIGIN_ATTRIBUTE = "_sparsiattn_origin"
"""Attribute that holds the origin of a model that `create_model` created."""

Origin = dict[str, Any]
"""``{"library": "timm", "name", "options"}``, the same of ``"torchvision"``, or ``{"library":
"transformers", "class", "config"}``."""

_SWITCHES = ("training", "fused_attn", "grad_checkpointing", "gradient_checkpointing")
"""Attributes that change while a model is used, and do not belong to its origin."""

_READS = {"checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "weights"}
"""Options of constructors that read other files; a saved file must not set them, for security."""


def mark(model: nn.Module, origin: Origin) -> nn.Module:
    """Record how a model was created, if that can be written as JSON."""
    try:
        plain = json.loads(json.dumps(origin))
    except (TypeError, ValueError):  # options that cannot be written as JSON
        return model
    if check_origin(plain):
        vars(model)[ORIGIN_ATTRIBUTE] = plain
    return model


def origin_of(model: nn.Module) -> Origin | None:
    """How to create this model again; None if it is not known.

    A recorded or guessed origin is used only if a model created from it (without memory for its
    weights) has the same class, the same names and shapes of weights and the same plain attributes.
    """
    for origin in _candidates(model):
        try:
            remade = without_memory(partial(_build, origin))
        except Exception:  # a guess may fail in any way
            continue
        if fingerprint(model) == fingerprint(remade) and _plain(model) == _plain(remade):
            return origin
    return None


def build(origin: Origin, pretrained: bool = False) -> nn.Module:
    """Create the model of an origin.

    Args:
        origin: The origin.
        pretrained: Whether to download its library's weights; otherwise they are random.

    Raises:
        InvalidOption: The model cannot be created here.
    """
    if pretrained and origin["library"] == "transformers":
        raise InvalidOption(
            "a transformers configuration does not contain the location of weights: use "
            "hf:ORG/NAME, or load them in Python and use sparsiattn.load(model, folder)"
        )
    try:
        return mark(_build(origin, pretrained), origin)
    except Exception as error:  # any error of the library's constructor
        name = origin.get("name", origin.get("class"))
        raise InvalidOption(
            f"{origin.get('library')} cannot create {name!r} here: {error}; install the version it "
            "was saved with, or build the model in Python and use sparsiattn.load(model, folder)"
        ) from error


def check_origin(origin: Any) -> bool:
    """Whether plain data has the form of an `Origin` and can only create a model."""
    if not isinstance(origin, Mapping):
        return False
    library, options = origin.get("library"), origin.get("options")
    if library == "transformers":
        return isinstance(origin.get("class"), str) and isinstance(origin.get("config"), dict)
    known = library in ("timm", "torchvision") and isinstance(origin.get("name"), str)
    return known and isinstance(options, dict) and not _READS.intersection(options)


def _build(origin: Origin, pretrained: bool = False) -> nn.Module:
    library = origin["library"]
    if library == "timm":
        import timm

        options = {k: tuple(v) if isinstance(v, list) else v for k, v in origin["options"].items()}
        return timm.create_model(origin["name"], pretrained=pretrained, **options)  # type: ignore[no-any-return]
    if library == "torchvision":
        import torchvision

        weights = "DEFAULT" if pretrained else None
        return torchvision.models.get_model(origin["name"], weights=weights, **origin["options"])  # type: ignore[no-any-return]
    import transformers

    saved = dict(origin["config"])
    config = transformers.AutoConfig.for_model(saved.pop("model_type"), **saved)
    # the class name comes from a file, so it must not name another callable
    kind = getattr(transformers, origin["class"])
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise InvalidOption(f"{origin['class']!r} is not a transformers model")
    return kind(config)  # type: ignore[no-any-return]


def without_memory(make: Callable[[], nn.Module]) -> nn.Module:
    """Create a model on the meta device, if possible.

    Memory is used if its constructor reads values, as older versions of timm and copies of them do.
    """
    try:
        with torch.device("meta"):
            return make()
    except Exception:  # any other error occurs again here
        with torch.random.fork_rng(devices=[]):
            return make()


def _candidates(model: nn.Module) -> Iterator[Origin]:
    noted = vars(model).get(ORIGIN_ATTRIBUTE)
    if noted is not None:
        yield noted
    module = type(model).__module__.partition(".")[0]
    if module == "timm":
        yield from _timm(model)
    elif module == "transformers":
        config: Any = model.config
        plain = json.loads(config.to_json_string(use_diff=True))
        plain.setdefault("model_type", config.model_type)
        yield {"library": "transformers", "class": type(model).__name__, "config": plain}


def _timm(model: Any) -> Iterator[Origin]:
    card = getattr(model, "pretrained_cfg", None)
    if not isinstance(card, Mapping) or not card.get("architecture"):
        return
    name = ".".join(filter(None, (card["architecture"], card.get("tag"))))
    options: dict[str, Any] = {}
    classes = getattr(model, "num_classes", None)
    if classes is not None and classes != card.get("num_classes"):
        options["num_classes"] = classes
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if size is not None and tuple(size) != tuple(card.get("input_size", ()))[1:]:
        options["img_size"] = list(size)
    stem = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    if stem is not None and stem.in_channels != 3:
        options["in_chans"] = stem.in_channels
    yield {"library": "timm", "name": name, "options": options}
    if "img_size" not in options and size is not None:
        yield {"library": "timm", "name": name, "options": {**options, "img_size": list(size)}}


def _plain(model: nn.Module) -> dict[str, Any]:
    """Attributes of all modules except planners that are numbers, strings or tuples of these."""
    return {
        f"{path}.{name}": value
        for path, module in model.named_modules()
        if PLANNER not in path.split(".")
        for name, value in vars(module).items()
        if not name.startswith("_") and name not in _SWITCHES and _is_plain(value)
    }


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return isinstance(value, (bool, int, float, str))
