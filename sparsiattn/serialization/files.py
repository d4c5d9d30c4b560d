"""The files of a saved patch: written atomically, and verified by checksums when they are read."""

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
"""Format 1 had neither checksums nor the host's origin; it can still be read."""
CONFIG, WEIGHTS, HOST = "sparsiattn.json", "planners.safetensors", "model.safetensors"
NEW = ".new"


class Saved(NamedTuple):
    """A saved patch that was verified.

    Attributes:
        config: The content of ``sparsiattn.json``.
        files: Path of each file that the config lists, by name.
    """

    config: dict[str, Any]
    files: dict[str, Path]


def write(folder: Path, config: dict[str, Any], tensors: dict[str, dict[str, Tensor]]) -> None:
    """Write a saved patch; if the process is killed, the old or the new one can be read.

    All files are written and synced under temporary names first, and then renamed. Between two
    renames the old config no longer fits the files, but the complete new config still has its
    temporary name, and `read` uses it.

    Args:
        folder: The folder, which must exist.
        config: The content of ``sparsiattn.json``, without checksums.
        tensors: Tensors of each file of weights, by name of the file.

    Raises:
        CheckpointNotWritten: Writing failed; the old patch is intact.
    """
    new = {name: folder / f"{name}{NEW}" for name in (*tensors, CONFIG)}
    try:
        _clean_up(folder)
        for name, content in tensors.items():
            safetensors.torch.save_file(content, new[name])
            atomic_io.sync(new[name])
        sums = {name: checksum(new[name]) for name in tensors}
        text = json.dumps(with_checksum({**config, "files": sums}), indent=2) + "\n"
        new[CONFIG].write_text(text, encoding="utf-8")
        atomic_io.sync(new[CONFIG])
        atomic_io.sync(folder)
        for name, path in new.items():
            path.replace(folder / name)
        atomic_io.sync(folder)
        # remove files of an earlier save that this one does not have
        for name in {WEIGHTS, HOST} - set(tensors):
            (folder / name).unlink(missing_ok=True)
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointNotWritten(f"{folder} cannot be written: {error}") from error


def _clean_up(folder: Path) -> None:
    """Complete or remove the files of an interrupted save."""
    saved = _left_by_a_kill(folder)
    if saved is not None:
        for name, path in saved.files.items():
            path.replace(folder / name)
        (folder / f"{CONFIG}{NEW}").replace(folder / CONFIG)
    # the config first, so that as long as it exists, its files are complete
    for name in (CONFIG, WEIGHTS, HOST):
        (folder / f"{name}{NEW}").unlink(missing_ok=True)


def _left_by_a_kill(folder: Path) -> Saved | None:
    """The patch of a save that was interrupted between its renames; None if there is none."""
    pending = folder / f"{CONFIG}{NEW}"
    if not pending.is_file() or _try_config(folder / CONFIG, folder) is not None:
        return None
    return _try_config(pending, folder)


def _try_config(path: Path, folder: Path) -> Saved | None:
    try:
        return _read_config(path, folder)
    except MismatchedPatch:
        return None


def checksum(path: Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def with_checksum(config: dict[str, Any]) -> dict[str, Any]:
    """A config with a checksum of its content."""
    # through JSON, so that tuples and the like have the same checksum when they are read again
    plain = json.loads(json.dumps({key: v for key, v in config.items() if key != "seal"}))
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"))
    return {**plain, "seal": hashlib.sha256(text.encode()).hexdigest()}


def read(folder: Path) -> Saved:
    """Read the config, and verify that its files are complete and unchanged.

    Raises:
        MismatchedPatch: A file is missing or was changed.
    """
    return _left_by_a_kill(folder) or _read_config(folder / CONFIG, folder)


def _read_config(path: Path, folder: Path) -> Saved:
    """Read and verify one config and its files."""
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
    _check_schema(config, _FORMAT_1, str(path))
    for name, site in config["sites"].items():
        _check_schema(site, _SITE, f"{path}: site {name!r}")
    if config["format"] == 1:
        return Saved({**config, "origin": None}, {WEIGHTS: folder / WEIGHTS})
    _check_schema(config, _ADDED_IN_FORMAT_2, str(path))
    if config["origin"] is not None and not check_origin(config["origin"]):
        raise MismatchedPatch(f"{path}: 'origin' must describe how to create the host, or be null")
    if with_checksum(config) != config:
        raise MismatchedPatch(
            f"{path} was changed after it was saved (its checksum differs): patch and save again "
            "instead of editing it"
        )
    return Saved(config, {name: _locate(folder, name, s) for name, s in config["files"].items()})


def _locate(folder: Path, name: str, expected: str) -> Path:
    """Path of a file with this checksum, which has its temporary name after an interrupted save."""
    if name not in (WEIGHTS, HOST):
        raise MismatchedPatch(f"{folder / CONFIG} lists an unexpected file {name!r}")
    for path in (folder / name, folder / f"{name}{NEW}"):
        if path.is_file() and checksum(path) == expected:
            return path
    change = "was changed or truncated after it was saved (its checksum differs)"
    fault = change if (folder / name).is_file() else "is missing"
    raise MismatchedPatch(f"{folder / name} {fault}")


Schema = dict[str, Any]
"""Keys of a mapping, each with the type of its value or the schema of a nested mapping."""

_FORMAT_1: Schema = {
    "format": int,
    "host": {"class": str, "weights": int, "sha256": str},
    "strategy": {"name": str, "version": int, "options": dict},
    "kernel": str,
    "input_shape": list,
    "sites": dict,
}
_ADDED_IN_FORMAT_2: Schema = {
    "sparsiattn": str,
    "origin": object,
    "schedule": dict,
    "files": {WEIGHTS: str},
    "seal": str,
}
_SITE = Schema(k=object, tokens=int, heads=int, head_dim=int, dense=bool, selected=bool)


def _check_schema(value: Any, schema: Schema, where: str) -> None:
    """Raise `MismatchedPatch` unless a value is a mapping with these keys and types of values."""
    if not isinstance(value, dict):
        raise MismatchedPatch(f"{where} must be a mapping with {sorted(schema)}, got {value!r}")
    for key, kind in schema.items():
        if key not in value:
            raise MismatchedPatch(f"{where} lacks {key!r}: not a saved patch, or an edited one")
        if isinstance(kind, dict):
            _check_schema(value[key], kind, f"{where}: {key!r}")
        elif not isinstance(value[key], kind):
            raise MismatchedPatch(f"{where}: {key!r} must be a {kind.__name__}, got {value[key]!r}")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file.

    Raises:
        MismatchedPatch: The file cannot be read.
    """
    try:
        return safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise MismatchedPatch(f"{path} cannot be read: {error}") from error
