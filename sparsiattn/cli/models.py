"""The one place where the command line turns a name into a model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import typer

from sparsiattn.errors import DataError, InvalidOption


def fresh(
    name: str, size: int | None, pretrained: bool, checkpoint: Path | None, **options: Any
) -> Any:  # fmt: skip
    """`create_model`; weights that stay random are the same in every process and every call, and a
    line on stderr says that they are."""
    import torch

    from sparsiattn.serialization.creating import create_model, is_saved
    from sparsiattn.serialization.host import has_weights

    torch.manual_seed(0)
    model = create_model(name, image_size=size, pretrained=pretrained, **options)
    own = is_saved(name) and has_weights(name)
    if not (pretrained or own) and checkpoint is None and is_first():
        typer.secho("random weights: give --pretrained or --checkpoint", fg="yellow", err=True)
    return model


def saved_in(model: str, planners: Path | None, strategy: str | None = None) -> Path | None:
    """The folder of the saved patch to apply: ``--planners``, or MODEL where that is one."""
    from sparsiattn.serialization.creating import is_saved

    if not is_saved(model):
        return planners
    if planners is not None:
        raise typer.BadParameter("MODEL is a saved patch already", param_hint="--planners")
    if strategy is not None:
        raise typer.BadParameter(
            "MODEL is a saved patch with its own strategy", param_hint="--strategy"
        )
    return Path(model)


def is_first() -> bool:
    """Whether this is the first of the processes that were launched."""
    return os.environ.get("RANK", "0") == "0"


def prepare(
    host: Any, given: dict[str, Any] | None, planners: Path | None, checkpoint: Path | None
) -> Any:
    """Weights and patch of a new model; gives the `Patch`, None where none is asked for.

    Planners that look at the weights must find them there, and those of the checkpoint have their
    place only after patching. A saved patch's own planners win.
    """
    import sparsiattn

    if checkpoint is not None:
        load_weights(host, checkpoint)
    if planners is not None:
        return sparsiattn.load(host, planners)
    learned = [] if checkpoint is None else planners_in(checkpoint)
    if given is None:
        if learned:
            raise sparsiattn.InvalidOption(
                f"{checkpoint} is of a patched model (it has {learned[0]!r}): say with which "
                "--strategy and options, or give --planners"
            )
        return None
    live = sparsiattn.patch(host, **given)
    if learned and checkpoint is not None:
        load_weights(host, checkpoint)
    return live


def load_weights(model: Any, path: Path) -> None:
    """A dense checkpoint into a model, or one of a patched model into a patched one; strictly.

    Of a checkpoint with the planners of a patch an unpatched model takes the rest.
    """
    from sparsiattn.patching.handle import patch_of

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
    from sparsiattn.runtime.site_runtime import PLANNER

    return f".{PLANNER}." in f".{name}"


def _read(path: Path) -> dict[str, Any]:
    from timm.models import load_state_dict

    try:
        return dict(load_state_dict(str(path), weights_only=True))
    except Exception as error:  # torch, pickle and safetensors each have their own
        raise DataError(f"{path} cannot be read as weights: {error}") from error


def noise(model: Any, size: int | None, batch: int) -> Any:
    """A batch of noise of the size the model takes, of its own precision and device."""
    import torch

    like = next(model.parameters())
    drawn = torch.randn(
        batch, *image_shape(model, size)[1:], generator=torch.Generator().manual_seed(0)
    )
    return drawn.to(like.device, like.dtype)


def image_shape(model: Any, size: int | None) -> tuple[int, ...]:
    """Of one image: the pixels asked for, else those the model is built for."""
    from sparsiattn.patching.discovery.backbone import backbone_of

    shape = backbone_of(model).input_shape(model)
    if shape is None and size is None:
        raise InvalidOption(
            f"{type(model).__name__} does not say its image size: give --image-size"
        )
    whole = shape or (1, 3, 0, 0)
    return whole if size is None else (*whole[:-2], size, size)
