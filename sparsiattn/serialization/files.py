"""The files of a saved patch: written so that a kill does no harm, read so that damage shows."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
from torch import Tensor

from sparsiattn.errors import CheckpointNotWritten, MismatchedPatch
from sparsiattn.kernels import atomic_io
from sparsiattn.serialization.origin import check_origin

FORMAT = 2
"""1 had neither checksums nor the host's origin; it is still read."""
CONFIG, WEIGHTS, HOST = "sparsiattn.json", "planners.safetensors", "model.safetensors"
NEW = ".new"


class Saved(NamedTuple):
    """A config that was checked, and where its files are: their name to their path."""

    config: dict[str, Any]
    files: dict[str, Path]


def write(folder: Path, config: dict[str, Any], tensors: dict[str, dict[str, Tensor]]) -> None:
    """Everything beside what is there first, on the disk for sure, and only then into its place.

    Between two replacements the old config does not fit the files any more, but the new one, whole
    beside it, does: `read` takes that. Raises `CheckpointNotWritten`; what was there is whole then.
    """
    try:
        _discard(folder)
        for name, content in tensors.items():
            safetensors.torch.save_file(content, folder / f"{name}{NEW}")
            atomic_io.sync(folder / f"{name}{NEW}")
        sums = {name: checksum(folder / f"{name}{NEW}") for name in tensors}
        text = json.dumps(with_checksum({**config, "files": sums}), indent=2) + "\n"
        (folder / f"{CONFIG}{NEW}").write_text(text, encoding="utf-8")
        atomic_io.sync(folder / f"{CONFIG}{NEW}")
        atomic_io.sync(folder)
        for name in (*tensors, CONFIG):
            (folder / f"{name}{NEW}").replace(folder / name)
        atomic_io.sync(folder)
        for name in {WEIGHTS, HOST} - set(tensors):
            (folder / name).unlink(missing_ok=True)
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointNotWritten(f"{folder} cannot be written: {error}") from error


def _discard(folder: Path) -> None:
    """Finish or remove what a kill left; the config goes first, so that it speaks for whole files
    as long as it is there."""
    pending = folder / f"{CONFIG}{NEW}"
    if pending.exists() and (saved := _whole(folder, pending)) is not None:
        for name, path in saved.files.items():
            path.replace(folder / name)
        pending.replace(folder / CONFIG)
    for name in (CONFIG, WEIGHTS, HOST):
        (folder / f"{name}{NEW}").unlink(missing_ok=True)


def _whole(folder: Path, config: Path) -> Saved | None:
    """A config left by a kill with its files, None where the current ones are to be kept."""
    try:
        read_config(folder / CONFIG, folder)
    except MismatchedPatch:
        try:
            return read_config(config, folder)
        except MismatchedPatch:
            return None
    return None


def checksum(path: Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def with_checksum(config: dict[str, Any]) -> dict[str, Any]:
    """A config with the checksum of all that it says."""
    plain = json.loads(json.dumps({key: v for key, v in config.items() if key != "seal"}))
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"))
    return {**plain, "seal": hashlib.sha256(text.encode()).hexdigest()}


def read(folder: Path) -> Saved:
    """The config and its files, whole and unchanged since they were saved. Raises
    `MismatchedPatch`."""
    pending = folder / f"{CONFIG}{NEW}"
    left = _whole(folder, pending) if pending.is_file() else None
    return read_config(folder / CONFIG, folder) if left is None else left


def read_config(path: Path, folder: Path) -> Saved:
    """One config, checked, with its files."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise MismatchedPatch(f"no saved patch in {folder}: {error}") from error
    except ValueError as error:
        raise MismatchedPatch(f"{path} is not JSON: {error}") from error
    if isinstance(config, dict) and config.get("format", FORMAT) not in (1, FORMAT):
        raise MismatchedPatch(
            f"{path} has format {config['format']!r}, this version reads formats 1 and {FORMAT}; "
            "update sparsiattn"
        )
    _expect(config, _FILE, str(path))
    _expect(config["host"], _HOST, f"{path}: host")
    _expect(config["strategy"], _STRATEGY, f"{path}: strategy")
    for name, site in config["sites"].items():
        _expect(site, _SITE, f"{path}: site {name!r}")
    if config["format"] == 1:
        return Saved({**config, "origin": None}, {WEIGHTS: folder / WEIGHTS})
    _expect(config, _SECOND, str(path))
    _expect(config["files"], {WEIGHTS: str}, f"{path}: files")
    if config["origin"] is not None and not check_origin(config["origin"]):
        raise MismatchedPatch(f"{path}: 'origin' must say how to make the host, or be null")
    if with_checksum(config) != config:
        raise MismatchedPatch(
            f"{path} was changed after it was saved (its checksum differs): patch and save again "
            "instead of editing it"
        )
    return Saved(config, {name: _found(folder, name, s) for name, s in config["files"].items()})


def _found(folder: Path, name: str, wanted: str) -> Path:
    """Where a file with this checksum is: in its place or, after a kill, still beside it."""
    if name not in (WEIGHTS, HOST):
        raise MismatchedPatch(f"{folder / CONFIG} names a file {name!r} that no saved patch has")
    for path in (folder / name, folder / f"{name}{NEW}"):
        if path.is_file() and checksum(path) == wanted:
            return path
    what = "was changed or cut short after it was saved (its checksum differs)"
    raise MismatchedPatch(f"{folder / name} {what if (folder / name).is_file() else 'is missing'}")


_FILE: dict[str, Any] = {
    "format": int, "host": dict, "strategy": dict, "kernel": str, "input_shape": list,
    "sites": dict,
}  # fmt: skip
_SECOND: dict[str, Any] = {
    "sparsiattn": str, "origin": object, "schedule": dict, "files": dict, "seal": str,
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


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file. Raises `MismatchedPatch` where it cannot be read."""
    try:
        return safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise MismatchedPatch(f"{path} cannot be read: {error}") from error
