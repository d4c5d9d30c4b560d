"""The file that stores the measurements of `tune`.

It is ``$SPARSIATTN_CACHE/tuning.json``, else ``$XDG_CACHE_HOME/sparsiattn/tuning.json`` or
``~/.cache/sparsiattn/tuning.json``, with one entry per device, torch version, library version and
dtype. A file that cannot be read or written is ignored, with one warning and a line in every
report.
"""

from __future__ import annotations

import json
import math
import os
import platform
import threading
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import torch

from sparsiattn._version import __version__
from sparsiattn.kernels.atomic_io import replacing

TUNING_FORMAT = 1
FILE_NAME = "tuning.json"
PRICE_FIELDS = ("call", "mac", "logit", "byte", "row")


class TuningIgnored(UserWarning):
    """The tuning file could not be used; the built-in prices are used instead."""


_LOCK = threading.Lock()
_entries_by_path: dict[Path, dict[str, Any]] = {}
_fault_by_path: dict[Path, str] = {}


def path() -> Path:
    """Path of the tuning file, whether or not it exists."""
    folder = os.environ.get("SPARSIATTN_CACHE")
    if folder:
        return Path(folder) / FILE_NAME
    cache_home = os.environ.get("XDG_CACHE_HOME")
    # expanduser returns "~" if there is no home, where Path.home() would raise
    root = Path(cache_home) if cache_home else Path(os.path.expanduser("~"), ".cache")
    return root / "sparsiattn" / FILE_NAME


def key(device: torch.device, dtype: torch.dtype) -> str:
    """The key of an entry: machine, versions and dtype."""
    versions = f"torch {torch.__version__} | sparsiattn {__version__}"
    return f"{device_name(device)} | {versions} | {str(dtype).removeprefix('torch.')}"


def device_name(device: torch.device) -> str:
    """The name of the GPU, or of the processor with the number of threads in use.

    >>> device_name(torch.device("cpu")).startswith("cpu ")
    True
    """
    if device.type == "cuda":
        found = gpu(device)
        return "cuda" if found is None else f"cuda {found[0]}"
    if device.type == "cpu":
        return f"cpu {processor()}, {torch.get_num_threads()} threads"
    return device.type


def gpu(device: torch.device) -> tuple[str, tuple[int, int]] | None:
    """Name and compute capability of a GPU; None if CUDA does not say, as of fake tensors."""
    if not torch.cuda.is_available():
        return None
    try:
        return torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    except (RuntimeError, AssertionError):
        return None


@cache
def processor() -> str:
    """The processor's name, as the operating system reports it."""
    line = cpuinfo("model name")
    return platform.processor() if line is None else line.split(":", 1)[1].strip()


def cpuinfo(*starts: str) -> str | None:
    """The first line of ``/proc/cpuinfo`` that starts with one of these; None if there is none."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    return next((line for line in lines if line.startswith(starts)), None)


def find(device: torch.device, dtype: torch.dtype) -> dict[str, Any] | None:
    """The entry for a device and dtype; None if no usable entry exists."""
    entry = _entries(path()).get(key(device, dtype))
    return entry if isinstance(entry, dict) else None


def fault() -> str | None:
    """Why the tuning file is ignored; None if it is not."""
    _entries(path())
    return _fault_by_path.get(path())


def forget() -> None:
    """Read the file again at the next use; a faulty file then warns again."""
    with _LOCK:
        _entries_by_path.clear()
        _fault_by_path.clear()


def _entries(file: Path) -> dict[str, Any]:
    """The entries of a file, read once per process."""
    with _LOCK:
        if file not in _entries_by_path:
            try:
                _entries_by_path[file] = _parse(file)
            except (OSError, ValueError) as error:
                _entries_by_path[file] = {}
                _ignore(file, f"{type(error).__name__}: {error}")
        return _entries_by_path[file]


def _ignore(file: Path, reason: str) -> None:
    message = f"{file} is ignored ({reason}); run `sparsiattn tune` to write it again"
    _fault_by_path[file] = message
    warnings.warn(message, TuningIgnored, stacklevel=4)


def _parse(file: Path) -> dict[str, Any]:
    """The entries of the file.

    Raises:
        ValueError: The content is not valid; the message says why.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return {}
    content = json.loads(text)
    if not isinstance(content, dict) or content.get("format") != TUNING_FORMAT:
        raise ValueError(f"not a tuning file of format {TUNING_FORMAT}")
    entries = content.get("entries")
    if not isinstance(entries, dict):
        raise ValueError("it has no entries")
    for name, entry in entries.items():
        _check(name, entry)
    return entries


def _check(name: str, entry: Any) -> None:
    content = entry if isinstance(entry, dict) else {}
    prices, rows = content.get("prices"), content.get("rows")
    if not isinstance(prices, dict) or not isinstance(rows, list):
        raise ValueError(f"entry {name!r} has no prices or no rows")
    for kernel, price in prices.items():
        fits = isinstance(price, dict) and sorted(price) == sorted(PRICE_FIELDS)
        if not fits or not all(_is_price(value) for value in price.values()):
            count = len(PRICE_FIELDS)
            raise ValueError(f"entry {name!r}: {kernel!r} needs {count} positive prices")
    _check_failed(name, content.get("failed", {}))


def _check_failed(name: str, failed: Any) -> None:
    if not isinstance(failed, dict):
        raise ValueError(f"entry {name!r}: 'failed' must map kernels to records")
    for kernel, record in failed.items():
        content = record if isinstance(record, dict) else {}
        if not isinstance(content.get("error"), str) or type(content.get("pairs")) is not int:
            raise ValueError(f"entry {name!r}: failed {kernel!r} needs an error and pairs")


def _is_price(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return 0 < value < math.inf


def write(entries: dict[str, Any]) -> Path | None:
    """Add entries to the file atomically.

    Entries of other machines and versions stay; a file that could not be read is replaced.

    Returns:
        The path of the file. If writing fails, None, with a warning; the entries are then valid in
        this process only.
    """
    file = path()
    with _LOCK:
        try:
            known = _parse(file)
        except (OSError, ValueError):
            known = {}
        _entries_by_path[file] = {**known, **entries}
        _fault_by_path.pop(file, None)
        content = {"format": TUNING_FORMAT, "entries": _entries_by_path[file]}
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            text = json.dumps(content, indent=1, allow_nan=False) + "\n"
            with replacing(file, shared=True) as temporary:
                temporary.write_text(text, encoding="utf-8")
        except OSError as error:
            _ignore(file, f"it cannot be written: {type(error).__name__}: {error}")
            return None
    return file
