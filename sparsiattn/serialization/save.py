"""Save a patch to disk as a JSON config and the planners' weights, without pickle."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sparsiattn._version import __version__
from sparsiattn.errors import InvalidOption
from sparsiattn.runtime.patch_state import PatchState
from sparsiattn.runtime.site_runtime import is_planner_key
from sparsiattn.serialization.auto_values import of_site
from sparsiattn.serialization.files import FORMAT, HOST, WEIGHTS, write
from sparsiattn.serialization.fingerprint import fingerprint
from sparsiattn.serialization.origin import origin_of
from sparsiattn.strategies.config import Config
from sparsiattn.strategies.hybrid import Hybrid


def save(state: PatchState, directory: Path, *, include_model: bool = False) -> Path:
    """Write ``sparsiattn.json`` and ``planners.safetensors``; see `Patch.save`.

    Saving is atomic: if the process is killed, the folder has the old or the new patch.

    Args:
        state: The patch.
        directory: The folder; it is created if it does not exist.
        include_model: Whether to write the host's weights too, as ``model.safetensors``.

    Returns:
        The folder.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise InvalidOption(f"save() needs a directory, but {directory} is a file") from error
    config = {
        "format": FORMAT,
        "sparsiattn": __version__,
        "host": fingerprint(state.model),
        "origin": origin_of(state.model),
        # budgets that differ between sites are stored with the sites
        "strategy": resolved(state).to_dict(),
        # for readers and for `patch(schedule=...)`; `load` reads the budgets of the sites below
        "schedule": schedule_of(state),
        "kernel": state.kernel,
        "input_shape": list(state.input_shape),
        **({} if state.structure is None else {"structure": state.structure.to_dict()}),
        "sites": {
            runtime.site.name: {
                "k": getattr(runtime.strategy, "k", None),
                "tokens": runtime.site.tokens,
                "keys": runtime.site.keys,
                "grid": list(runtime.site.key_grid),
                "views": runtime.site.views,
                "auto": of_site(runtime.strategy, runtime.site),
                "heads": runtime.site.heads,
                "head_dim": runtime.site.head_dim,
                "dense": runtime.dense,
                "selected": runtime.selected,
            }
            for runtime in state.runtimes
        },
    }
    tensors = {WEIGHTS: planner_tensors(state)}
    if include_model:
        tensors[HOST] = host_tensors(state.model)
    write(directory, config, tensors)
    return directory


def resolved(state: PatchState) -> Config:
    """The strategy with all decisions of patch time filled in."""
    attention = next(r.strategy for r in state.runtimes if r.selected)
    if isinstance(state.strategy, Hybrid):
        return replace(state.strategy, **_cleared(attention, state.tokens))
    return attention if state.tokens is None else state.tokens


def _cleared(attention: Config, tokens: Config | None) -> dict[str, Any]:
    """Fields of a `Hybrid` with the values of its two parts."""
    both = {"attention": attention, "tokens": tokens}
    names = [field.name for field in fields(Hybrid) if field.name not in both]
    values = {name: getattr(attention, name, getattr(tokens, name, None)) for name in names}
    return {**both, **values}


def schedule_of(state: PatchState) -> dict[str, Any]:
    """All resolved budgets, in the form that ``patch(schedule=...)`` takes."""
    budgets = {
        runtime.site.name: k
        for runtime in state.runtimes
        if runtime.selected and (k := getattr(runtime.strategy, "k", None)) is not None
    }
    schedule: dict[str, Any] = {"k": budgets} if budgets else {}
    tokens = state.tokens
    layers = getattr(tokens, "layers", None)
    for kind in () if tokens is None else tokens.per_layer:
        values = getattr(tokens, kind, None)
        if isinstance(layers, (list, tuple)) and isinstance(values, (list, tuple)):
            pairs = zip(layers, values, strict=False)
            schedule[kind] = {str(layer): value for layer, value in pairs}
    return schedule


def planner_tensors(state: PatchState) -> dict[str, Tensor]:
    """The weights of every learned planner, by ``<site>.<name>``."""
    return {
        f"{runtime.site.name}.{name}": tensor.detach().contiguous()
        for runtime in state.runtimes
        if isinstance(runtime.planner, nn.Module)
        for name, tensor in runtime.planner.state_dict().items()
    }


def host_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The state dict without planners; safetensors requires tied weights to be written twice."""
    return {
        name: tensor.detach().cpu().contiguous().clone()
        for name, tensor in model.state_dict().items()
        if not is_planner_key(name)
    }
