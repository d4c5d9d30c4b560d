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
    """A saved patch that was checked.

    Attributes:
        config: What ``sparsiattn.json`` says.
        files: Name of each file that it speaks of to the path where that is.
    """

    config: dict[str, Any]
    files: dict[str, Path]


def write(folder: Path, config: dict[str, Any], tensors: dict[str, dict[str, Tensor]]) -> None:
    """Write a saved patch, of which a kill leaves the old or the new one.

    Everything goes beside what is there first, on the disk for sure, and only then into its place.
    Between two replacements the old config does not fit the files any more, but the new one, whole
    beside it, does: `read` takes that.

    Args:
        folder: Where to; it exists.
        config: What ``sparsiattn.json`` will say, without checksums.
        tensors: Name of each file of weights to what it holds.

    Raises:
        CheckpointNotWritten: The disk refuses; what was there is whole then.
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
        # what an earlier save wrote and this one does not
        for name in {WEIGHTS, HOST} - set(tensors):
            (folder / name).unlink(missing_ok=True)
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointNotWritten(f"{folder} cannot be written: {error}") from error


def _clean_up(folder: Path) -> None:
    """Finish or remove what a kill left."""
    saved = _left_by_a_kill(folder)
    if saved is not None:
        for name, path in saved.files.items():
            path.replace(folder / name)
        (folder / f"{CONFIG}{NEW}").replace(folder / CONFIG)
    # the config first, so that it speaks for complete files as long as it is there
    for name in (CONFIG, WEIGHTS, HOST):
        (folder / f"{name}{NEW}").unlink(missing_ok=True)


def _left_by_a_kill(folder: Path) -> Saved | None:
    """What was saved last, where a kill came between the replacements."""
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
    """A config with the checksum of all that it says."""
    # through JSON, so that tuples and the like give the checksum of what is read again
    plain = json.loads(json.dumps({key: v for key, v in config.items() if key != "seal"}))
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"))
    return {**plain, "seal": hashlib.sha256(text.encode()).hexdigest()}


def read(folder: Path) -> Saved:
    """The config and its files, complete and unchanged since they were saved.

    Raises:
        MismatchedPatch: They are not, or not there.
    """
    return _left_by_a_kill(folder) or _read_config(folder / CONFIG, folder)


def _read_config(path: Path, folder: Path) -> Saved:
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
    _check_schema(config, _FORMAT_1, str(path))
    for name, site in config["sites"].items():
        _check_schema(site, _SITE, f"{path}: site {name!r}")
    if config["format"] == 1:
        return Saved({**config, "origin": None}, {WEIGHTS: folder / WEIGHTS})
    _check_schema(config, _ADDED_IN_FORMAT_2, str(path))
    if config["origin"] is not None and not check_origin(config["origin"]):
        raise MismatchedPatch(f"{path}: 'origin' must say how to make the host, or be null")
    if with_checksum(config) != config:
        raise MismatchedPatch(
            f"{path} was changed after it was saved (its checksum differs): patch and save again "
            "instead of editing it"
        )
    return Saved(config, {name: _locate(folder, name, s) for name, s in config["files"].items()})


def _locate(folder: Path, name: str, expected: str) -> Path:
    """Where a file with this checksum is: in its place or, after a kill, still beside it."""
    if name not in (WEIGHTS, HOST):
        raise MismatchedPatch(f"{folder / CONFIG} names a file {name!r} that no saved patch has")
    for path in (folder / name, folder / f"{name}{NEW}"):
        if path.is_file() and checksum(path) == expected:
            return path
    what = "was changed or cut short after it was saved (its checksum differs)"
    raise MismatchedPatch(f"{folder / name} {what if (folder / name).is_file() else 'is missing'}")


Schema = dict[str, Any]
"""Keys of a mapping, each with the type of its value or the schema of a mapping in it."""

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
    """Raise unless a value is a mapping with these keys and types of values."""
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
        MismatchedPatch: It cannot be read.
    """
    try:
        return safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise MismatchedPatch(f"{path} cannot be read: {error}") from error
