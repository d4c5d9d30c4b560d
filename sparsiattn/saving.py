"""A patch on disk: a JSON config and the planners' weights. Never pickle."""

from __future__ import annotations

import hashlib
import json
from dataclasses import fields, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors
import safetensors.torch
from torch import Tensor, nn

from sparsiattn.config import Config
from sparsiattn.errors import InvalidOption, MismatchedPatch
from sparsiattn.registry import REGISTRY
from sparsiattn.strategies.hybrid import Hybrid
from sparsiattn.tokens import TokenStrategy

if TYPE_CHECKING:
    from sparsiattn.handle import Patch

FORMAT = 1
CONFIG, WEIGHTS = "sparsiattn.json", "planners.safetensors"


def save(handle: Patch, directory: Path) -> Path:
    """Write ``sparsiattn.json`` and ``planners.safetensors``; see `Patch.save`."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise InvalidOption(f"save() needs a directory, {directory} is a file") from error
    config = {
        "format": FORMAT,
        "host": fingerprint(handle.model),
        # budgets that differ between sites stand with the sites
        "strategy": resolved(handle).to_dict(),
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
    safetensors.torch.save_file(planner_tensors(handle), directory / WEIGHTS)
    (directory / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
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


def planner_tensors(handle: Patch) -> dict[str, Tensor]:
    """``<site>.<name>`` to weight, for every learned planner."""
    return {
        f"{runtime.site.name}.{name}": tensor.detach().contiguous()
        for runtime in handle.runtimes
        if isinstance(runtime.planner, nn.Module)
        for name, tensor in runtime.planner.state_dict().items()
    }


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """What a saved patch must find again: the class, and the names and shapes of all weights but
    the planners' own."""
    from sparsiattn.runtime import PLANNER

    own = [
        f"{name}:{tuple(tensor.shape)}"
        for name, tensor in model.state_dict().items()
        if f".{PLANNER}." not in f".{name}"
    ]
    digest = hashlib.sha256("\n".join(own).encode()).hexdigest()
    return {"class": type(model).__name__, "weights": len(own), "sha256": digest}


def load(model: nn.Module, directory: str | PathLike[str]) -> Patch:
    """Apply a saved patch again. Every mismatch is one `MismatchedPatch`, the model untouched.

    >>> import tempfile, timm, sparsiattn
    >>> model = timm.create_model("test_vit")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with sparsiattn.patch(model, k=0.2) as patch:
    ...         _ = patch.save(folder)
    ...     sparsiattn.load(model, folder)
    <Patch: connectivity on 6 sites of VisionTransformer, kernel='auto'>
    """
    from sparsiattn.handle import unwrap
    from sparsiattn.patching import patch

    model, folder = unwrap(model), Path(directory)
    config = _read_config(folder)
    _check_host(model, config)
    strategy, budgets = _strategy(config)
    tensors = _read_tensors(folder)
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


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text())
    except OSError as error:
        raise MismatchedPatch(f"no saved patch in {folder}: {error}") from error
    except ValueError as error:
        raise MismatchedPatch(f"{path} is not JSON: {error}") from error
    if isinstance(config, dict) and config.get("format", FORMAT) != FORMAT:
        raise MismatchedPatch(
            f"{path} has format {config['format']!r}, this version reads format {FORMAT}; "
            "update sparsiattn"
        )
    _expect(config, _FILE, str(path))
    _expect(config["host"], _HOST, f"{path}: host")
    _expect(config["strategy"], _STRATEGY, f"{path}: strategy")
    for name, site in config["sites"].items():
        _expect(site, _SITE, f"{path}: site {name!r}")
    return config  # type: ignore[no-any-return]


_FILE: dict[str, Any] = {
    "format": int, "host": dict, "strategy": dict, "kernel": str, "input_shape": list,
    "sites": dict,
}  # fmt: skip
_HOST: dict[str, Any] = {"class": str, "weights": int, "sha256": str}
_STRATEGY: dict[str, Any] = {"name": str, "version": int, "options": dict}
_SITE: dict[str, Any] = {
    "k": object, "tokens": int, "heads": int, "head_dim": int, "dense": bool,
    "selected": bool,
}  # fmt: skip


def _expect(found: Any, wanted: dict[str, Any], where: str) -> None:
    """Raise unless ``found`` is a mapping with these keys and types of values."""
    if not isinstance(found, dict):
        raise MismatchedPatch(f"{where} must be a mapping with {sorted(wanted)}, got {found!r}")
    for key, kind in wanted.items():
        if key not in found:
            raise MismatchedPatch(f"{where} lacks {key!r}: not a saved patch, or an edited one")
        if not isinstance(found[key], kind):
            raise MismatchedPatch(f"{where}: {key!r} must be a {kind.__name__}, got {found[key]!r}")


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


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    path = folder / WEIGHTS
    try:
        return safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise MismatchedPatch(f"{path} cannot be read: {error}") from error


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
