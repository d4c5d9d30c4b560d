"""Loads saved patches and applies them to models."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sparsiattn.errors import InvalidOption, MismatchedPatch
from sparsiattn.patching.apply import patch_quietly
from sparsiattn.patching.handle import Patch
from sparsiattn.patching.model_speed import note_speed
from sparsiattn.registry.registry import REGISTRY
from sparsiattn.runtime.patch_state import set_dense, unwrap
from sparsiattn.serialization.auto_values import with_saved_values
from sparsiattn.serialization.files import HOST, WEIGHTS, Saved, read, read_tensors
from sparsiattn.serialization.fingerprint import fingerprint
from sparsiattn.serialization.host import make_host
from sparsiattn.serialization.hub import download
from sparsiattn.serialization.save import planner_tensors
from sparsiattn.strategies.config import Config
from sparsiattn.strategies.token_base import TokenStrategy


def from_pretrained(
    name: str | PathLike[str],
    model: nn.Module | None = None,
    *,
    pretrained: bool | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Patch:
    """Load a saved patch with its model; ``from_pretrained(name).model`` is ready to run.

    Args:
        name: A folder that `Patch.save` wrote, or ``ORG/NAME`` on the Hugging Face Hub.
        model: The model to patch; None to create it from the saved config.
        pretrained: For a patch saved without the model's weights: True to load the weights that
            the model's library publishes, False for random ones. None raises in that case.
        revision: Branch, tag or commit on the Hub.
        token: Access token of the Hub, or whether to use the stored one.
        cache_dir: Folder for downloads; None for the default one.
        local_files_only: Whether to use files in the cache only, without network access.

    Raises:
        UnknownName: There is no such folder or repository.
        MismatchedPatch: A file is damaged or belongs to another model.
        InvalidOption: The model cannot be created.

    >>> import tempfile, timm, sparsiattn
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with sparsiattn.patch(timm.create_model("test_vit"), k=0.2) as patch:
    ...         _ = patch.save(folder, include_model=True)
    ...     from_pretrained(folder).title
    'connectivity on 6 sites of VisionTransformer'
    """
    if model is not None and pretrained is not None:
        raise InvalidOption(
            "pretrained= is for a model that is created here, but model= was given: pass only one"
        )
    folder = Path(name)
    if not folder.exists():
        folder = download(
            str(name),
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
    saved = read(folder)
    if model is not None:
        return apply_saved(model, saved)
    if pretrained is None and HOST not in saved.files:
        raise InvalidOption(
            f"{name} has no weights of the model: pass model=, or pretrained=True for the "
            "published weights, or pretrained=False for random ones"
        )
    host = make_host(saved, str(name), bool(pretrained))
    return apply_saved(host.eval(), saved)


def load(model: nn.Module, directory: str | PathLike[str], *, input: Any = None) -> Patch:
    """Apply a saved patch to a model.

    Args:
        model: A model like the one that was patched.
        directory: A folder that `Patch.save` wrote.
        input: Example input as in `patch`; needed only if the patch was made with an input that is
            not an image (a dict, a tuple).

    Returns:
        The active patch.

    Raises:
        MismatchedPatch: The patch is damaged or belongs to another model; the model is unchanged.

    >>> import tempfile, timm, sparsiattn
    >>> model = timm.create_model("test_vit")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with sparsiattn.patch(model, k=0.2) as patch:
    ...         _ = patch.save(folder)
    ...     sparsiattn.load(model, folder).title
    'connectivity on 6 sites of VisionTransformer'
    """
    return apply_saved(model, read(Path(directory)), input)


def apply_saved(model: nn.Module, saved: Saved, input: Any = None) -> Patch:
    """Apply a saved patch that was read from its files; ``input`` as in `load`."""
    config = saved.config
    _check_host(unwrap(model), config)  # first: in another model, names of sites mean nothing
    strategy, budgets = _strategy(config)
    tensors = read_tensors(saved.files[WEIGHTS])
    patched = patch_quietly(
        model,
        strategy,
        sites="*" if isinstance(strategy, TokenStrategy) else _selected(config),
        kernel=config["kernel"],
        schedule={"k": budgets} if budgets else None,
        input=_example(config) if input is None else input,
        cut_to_grid=True,
        **config.get("structure", {}),  # as the user gave it to `patch`
    )
    try:
        _restore_sites(patched, config)
        _fill(patched, tensors)
        note_speed(patched)
    except BaseException:
        patched.unpatch()
        raise
    return patched


def _example(config: dict[str, Any]) -> tuple[int, ...]:
    """The shape that the patch was made for."""
    shape = tuple(config["input_shape"])
    if len(shape) < 3:
        raise InvalidOption(
            f"the patch was made with an input that is not an image (its first tensor has shape "
            f"{shape}): pass the same input= to load()"
        )
    return shape


def _selected(config: dict[str, Any]) -> Any:
    names = {name for name, site in config["sites"].items() if site["selected"]}
    return lambda site: site.name in names


def _check_host(model: nn.Module, config: dict[str, Any]) -> None:
    here, saved = fingerprint(model), config["host"]
    if here == saved:
        return
    differs = [
        f"{key} was {saved.get(key)!r} and is {here[key]!r} here"
        for key in here
        if saved.get(key) != here[key]
    ]
    raise MismatchedPatch(f"the saved patch belongs to another model: {'; '.join(differs)}")


def _strategy(config: dict[str, Any]) -> tuple[Config, dict[str, Any]]:
    kind: type[Config] = REGISTRY.get("strategies", config["strategy"]["name"])
    budgets = {n: s["k"] for n, s in config["sites"].items() if s["k"] is not None}
    strategy = with_saved_values(kind.from_dict(config["strategy"]), config["sites"])
    return strategy, budgets


def _restore_sites(patched: Patch, config: dict[str, Any]) -> None:
    sites = {runtime.site.name: runtime.site for runtime in patched.runtimes}
    for name, saved in config["sites"].items():
        site = sites.get(name)
        if site is None:
            raise MismatchedPatch(f"the saved patch has site {name!r}, but this model does not")
        if site.views > 1 and "views" not in saved:
            raise MismatchedPatch(
                f"site {name!r} has {site.views} images in its sequence, but this patch was saved "
                "when tiles and summary keys could span several images: patch the model and save "
                "it again"
            )
        for key in ("tokens", "heads", "head_dim"):
            if getattr(site, key) != saved[key]:
                raise MismatchedPatch(
                    f"site {name!r} has {key} {getattr(site, key)}, but the saved patch has "
                    f"{saved[key]}"
                )
    # keep the decisions made where the patch was saved: speeds may differ on this machine
    for runtime in patched.runtimes:
        set_dense(patched, runtime, config["sites"][runtime.site.name]["dense"])


def _fill(patched: Patch, tensors: dict[str, Tensor]) -> None:
    present, renamed = planner_tensors(patched), _renamed_weights(patched)
    tensors = {renamed.get(name, name): tensor for name, tensor in tensors.items()}
    if set(present) != set(tensors):
        missing, extra = sorted(set(present) - set(tensors)), sorted(set(tensors) - set(present))
        raise MismatchedPatch(f"planner weights differ: missing {missing}, unexpected {extra}")
    for name, tensor in tensors.items():
        if present[name].shape != tensor.shape:
            raise MismatchedPatch(
                f"planner weight {name!r} has shape {tuple(tensor.shape)} on disk, but "
                f"{tuple(present[name].shape)} here"
            )
    for runtime in patched.runtimes:
        if isinstance(runtime.planner, nn.Module):
            start = f"{runtime.site.name}."
            runtime.planner.load_state_dict(
                {n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)}
            )


def _renamed_weights(patched: Patch) -> dict[str, str]:
    """``<site>.<name>`` of planner weights in files of older versions, to the current name."""
    return {
        f"{runtime.site.name}.{old}": f"{runtime.site.name}.{new}"
        for runtime in patched.runtimes
        for old, new in getattr(runtime.planner, "renamed_weights", {}).items()
    }
