"""A patch on disk: a JSON config and the planners' weights. Never pickle."""

from __future__ import annotations

from dataclasses import fields, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors
import safetensors.torch
from torch import Tensor, nn

from sparsiattn.errors import InvalidOption, MismatchedPatch
from sparsiattn.registry.registry import REGISTRY
from sparsiattn.serialization.files import (
    CONFIG,
    FORMAT,
    HOST,
    WEIGHTS,
    Saved,
    fingerprint,
    read,
    write,
)
from sparsiattn.serialization.origin import origin_of
from sparsiattn.strategies.config import Config
from sparsiattn.strategies.hybrid import Hybrid
from sparsiattn.strategies.token_base import TokenStrategy

if TYPE_CHECKING:
    from sparsiattn.runtime.handle import Patch

__all__ = ["CONFIG", "FORMAT", "HOST", "WEIGHTS", "fingerprint", "load", "save"]


def save(handle: Patch, directory: Path, *, whole: bool = False) -> Path:
    """Write ``sparsiattn.json`` and ``planners.safetensors``, with ``model.safetensors`` if
    ``whole``; see `Patch.save` and `Patch.merge_and_export`. A kill at any moment leaves what was
    there before or what is saved now, never a mixture."""
    from sparsiattn import __version__

    try:
        directory.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise InvalidOption(f"save() needs a directory, {directory} is a file") from error
    config = {
        "format": FORMAT,
        "sparsiattn": __version__,
        "host": fingerprint(handle.model),
        "origin": origin_of(handle.model),
        # budgets that differ between sites stand with the sites
        "strategy": resolved(handle).to_dict(),
        "schedule": schedule_of(handle),
        "kernel": handle.kernel,
        "input_shape": list(handle.input_shape),
        "sites": {
            runtime.site.name: {
                "k": getattr(runtime.strategy, "k", None),
                "tokens": runtime.site.tokens,
                "heads": runtime.site.heads,
                "head_dim": runtime.site.head_dim,
                "dense": runtime.dense,
                "selected": runtime.selected,
            }
            for runtime in handle.runtimes
        },
    }
    tensors = {WEIGHTS: planner_tensors(handle)}
    if whole:
        tensors[HOST] = host_tensors(handle.model)
    write(directory, config, tensors)
    return directory


def resolved(handle: Patch) -> Config:
    """The strategy with everything that was decided at patch time put in."""
    attention = next(r.strategy for r in handle.runtimes if r.selected)
    if isinstance(handle.strategy, Hybrid):
        return replace(handle.strategy, **_cleared(attention, handle.tokens))
    return attention if handle.tokens is None else handle.tokens


def _cleared(attention: Config, tokens: Config | None) -> dict[str, Any]:
    """Fields of a `Hybrid` that say what its two parts say."""
    both = {"attention": attention, "tokens": tokens}
    names = [field.name for field in fields(Hybrid) if field.name not in both]
    values = {name: getattr(attention, name, getattr(tokens, name, None)) for name in names}
    return {**both, **values}


def schedule_of(handle: Patch) -> dict[str, Any]:
    """Every resolved budget, in the form that ``patch(schedule=...)`` takes."""
    budgets = {
        runtime.site.name: k
        for runtime in handle.runtimes
        if runtime.selected and (k := getattr(runtime.strategy, "k", None)) is not None
    }
    found: dict[str, Any] = {"k": budgets} if budgets else {}
    tokens = handle.tokens
    layers = getattr(tokens, "layers", None)
    for kind in () if tokens is None else tokens.per_layer:
        values = getattr(tokens, kind, None)
        if isinstance(layers, (list, tuple)) and isinstance(values, (list, tuple)):
            pairs = zip(layers, values, strict=False)
            found[kind] = {str(layer): value for layer, value in pairs}
    return found


def planner_tensors(handle: Patch) -> dict[str, Tensor]:
    """``<site>.<name>`` to weight, for every learned planner."""
    return {
        f"{runtime.site.name}.{name}": tensor.detach().contiguous()
        for runtime in handle.runtimes
        if isinstance(runtime.planner, nn.Module)
        for name, tensor in runtime.planner.state_dict().items()
    }


def host_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The state dict without planners; tied weights are written twice, which the format wants."""
    from sparsiattn.runtime.site_runtime import PLANNER

    return {
        name: tensor.detach().cpu().contiguous().clone()
        for name, tensor in model.state_dict().items()
        if f".{PLANNER}." not in f".{name}"
    }


def load(model: nn.Module, directory: str | PathLike[str]) -> Patch:
    """Apply a saved patch again, as `Patch.save` wrote it to ``directory``. Every mismatch is one
    `MismatchedPatch`, the model untouched.

    >>> import tempfile, timm, sparsiattn
    >>> model = timm.create_model("test_vit")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with sparsiattn.patch(model, k=0.2) as patch:
    ...         _ = patch.save(folder)
    ...     sparsiattn.load(model, folder)
    <Patch: connectivity on 6 sites of VisionTransformer, kernel='auto'>
    """
    return apply(model, read(Path(directory)))


def apply(model: nn.Module, saved: Saved) -> Patch:
    """A patch that was read, put on a model."""
    from sparsiattn.patching.apply import patch
    from sparsiattn.runtime.handle import unwrap

    model, config = unwrap(model), saved.config
    _check_host(model, config)
    strategy, budgets = _strategy(config)
    tensors = _read_tensors(saved.files[WEIGHTS])
    handle = patch(
        model,
        strategy,
        sites="*" if isinstance(strategy, TokenStrategy) else _selected(config),
        kernel=config["kernel"],
        schedule={"k": budgets} if budgets else None,
        input=tuple(config["input_shape"]),
    )
    try:
        _restore_sites(handle, config)
        _fill(handle, tensors)
    except BaseException:
        handle.unpatch()
        raise
    return handle


def _selected(config: dict[str, Any]) -> Any:
    names = {name for name, site in config["sites"].items() if site["selected"]}
    return lambda site: site.name in names


def _check_host(model: nn.Module, config: dict[str, Any]) -> None:
    here, saved = fingerprint(model), config["host"]
    if here == saved:
        return
    differs = [
        f"{key} {saved.get(key)!r} there, {here[key]!r} here"
        for key in here
        if saved.get(key) != here[key]
    ]
    raise MismatchedPatch(f"the saved patch belongs to another model: {'; '.join(differs)}")


def _strategy(config: dict[str, Any]) -> tuple[Config, dict[str, Any]]:
    saved = config["strategy"]
    found: type[Config] = REGISTRY.get("strategies", saved["name"])
    if saved["version"] != found.version:
        raise MismatchedPatch(
            f"strategy {found.name!r} was saved in version {saved['version']}, this is version "
            f"{found.version}"
        )
    budgets = {n: s["k"] for n, s in config["sites"].items() if s["k"] is not None}
    return found.build(saved["options"]), budgets


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise MismatchedPatch(f"{path} cannot be read: {error}") from error


def load_host(model: nn.Module, saved: Saved) -> None:
    """The weights of `Patch.merge_and_export` into the model; nothing is loaded unless all fit."""
    path = saved.files[HOST]
    try:
        tensors = _read_tensors(path)
        own = model.state_dict()
        wrong = sorted(set(own) ^ set(tensors))
        wrong += [n for n in own if n in tensors and own[n].shape != tensors[n].shape]
        if wrong:
            raise MismatchedPatch(f"{path} does not fit {type(model).__name__}: {wrong[:3]} differ")
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise MismatchedPatch(f"{path} does not fit {type(model).__name__}: {error}") from error


def _restore_sites(handle: Patch, config: dict[str, Any]) -> None:
    found = {runtime.site.name: runtime.site for runtime in handle.runtimes}
    for name, saved in config["sites"].items():
        site = found.get(name)
        if site is None:
            raise MismatchedPatch(f"the saved patch has a site {name!r} that this model lacks")
        for key in ("tokens", "heads", "head_dim"):
            if getattr(site, key) != saved[key]:
                raise MismatchedPatch(
                    f"site {name!r} has {key} {getattr(site, key)}, the saved patch {saved[key]}"
                )
    for runtime in handle.runtimes:
        runtime.dense = config["sites"][runtime.site.name]["dense"]


def _fill(handle: Patch, tensors: dict[str, Tensor]) -> None:
    own = planner_tensors(handle)
    if set(own) != set(tensors):
        missing, extra = sorted(set(own) - set(tensors)), sorted(set(tensors) - set(own))
        raise MismatchedPatch(f"planner weights differ: missing {missing}, unexpected {extra}")
    for name, tensor in tensors.items():
        if own[name].shape != tensor.shape:
            raise MismatchedPatch(
                f"planner weight {name!r} has shape {tuple(tensor.shape)} on disk, "
                f"{tuple(own[name].shape)} here"
            )
    for runtime in handle.runtimes:
        if isinstance(runtime.planner, nn.Module):
            start = f"{runtime.site.name}."
            runtime.planner.load_state_dict(
                {n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)}
            )
