"""The one place where the command line turns a name into a model."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path
from typing import Any

from sparsiattn.errors import DataError, InvalidOption, UnknownName


def create(
    name: str, size: int | None = None, pretrained: bool = False, **options: Any
) -> Any:  # fmt: skip
    """A timm model by name; size: of its images in pixels, options: of `timm.create_model`."""
    import timm

    if ":" not in name and not timm.is_model(name):
        close = get_close_matches(name, timm.list_models(), n=3, cutoff=0.5)
        hint = f" Did you mean {' or '.join(close)}?" if close else ""
        raise UnknownName(f"timm has no model {name!r}.{hint}")
    extra = options if size is None else {"img_size": size, **options}
    try:
        return timm.create_model(name, pretrained=pretrained, **extra)
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        raise InvalidOption(
            f"timm cannot make {name!r}{f' with {extra}' if extra else ''}: {error}"
        ) from error


def load_weights(model: Any, path: Path) -> None:
    """A dense checkpoint into a model, or one of a patched model into a patched one; strictly.

    Of a checkpoint with the planners of a patch an unpatched model takes the rest.
    """
    from sparsiattn.handle import patch_of

    state, patched = _read(path), patch_of(model) is not None
    weights = state if patched else {n: t for n, t in state.items() if not is_planner(n)}
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        lines = str(error).splitlines()
        raise DataError(
            f"{path} does not fit this {type(model).__name__}: {' '.join(lines[1:3]).strip()[:400]}"
        ) from error


def planners_in(path: Path) -> list[str]:
    """Names of the planners' tensors in a checkpoint of a patched model."""
    return [name for name in _read(path) if is_planner(name)]


def is_planner(name: str) -> bool:
    from sparsiattn.runtime import PLANNER

    return f".{PLANNER}." in f".{name}"


def _read(path: Path) -> dict[str, Any]:
    from timm.models import load_state_dict

    try:
        return dict(load_state_dict(str(path), weights_only=True))
    except Exception as error:  # torch, pickle and safetensors each have their own
        raise DataError(f"{path} cannot be read as weights: {error}") from error


def with_noise(
    name: str, size: int | None, batch: int, device: str, dtype: Any, pretrained: bool
) -> tuple[Any, Any]:
    """The timm model and a batch of noise of the size it takes."""
    import torch

    model = create(name, size, pretrained).eval().to(device, dtype)
    torch.manual_seed(0)
    return model, torch.randn(batch, *image_shape(model, size)[1:]).to(device, dtype)


def image_shape(model: Any, size: int | None) -> tuple[int, ...]:
    """Of one image: the pixels asked for, else those the model was trained on."""
    channels, rows, columns = model.pretrained_cfg["input_size"]
    return 1, channels, size or rows, size or columns
