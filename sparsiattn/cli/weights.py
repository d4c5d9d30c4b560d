"""Weights from ``--checkpoint``: of a dense model, or of a patched one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sparsiattn.errors import DataError


def load_weights(model: Any, path: Path) -> None:
    """A dense checkpoint into a model, or one of a patched model into a patched one; strictly.

    Of a checkpoint with the planners of a patch an unpatched model takes the rest.
    """
    from sparsiattn import patch_of
    from sparsiattn.runtime.site_runtime import is_planner_key

    weights = _read_weights(path)
    if patch_of(model) is None:
        weights = {name: tensor for name, tensor in weights.items() if not is_planner_key(name)}
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        lines = str(error).splitlines()
        raise DataError(
            f"{path} does not fit this {type(model).__name__}: {' '.join(lines[1:3]).strip()[:400]}"
        ) from error


def planners_in(path: Path) -> list[str]:
    """Names of the planners' tensors in a checkpoint of a patched model."""
    from sparsiattn.runtime.site_runtime import is_planner_key

    return [name for name in _read_weights(path) if is_planner_key(name)]


def _read_weights(path: Path) -> dict[str, Any]:
    from timm.models import load_state_dict

    try:
        return dict(load_state_dict(str(path), weights_only=True))
    except Exception as error:  # torch, pickle and safetensors each have their own
        raise DataError(f"{path} cannot be read as weights: {error}") from error
