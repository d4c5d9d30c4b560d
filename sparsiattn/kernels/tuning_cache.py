"""The file in which `tune` keeps its measurements.

``$SPARSIATTN_CACHE/tuning.json``, else ``$XDG_CACHE_HOME/sparsiattn/tuning.json`` or
``~/.cache/sparsiattn/tuning.json``. One entry per device, torch and library version, and dtype; a
file that cannot be read or written is ignored with one warning and a line in every report.
"""

from __future__ import annotations

import json
import math
import os
import threading
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import torch

from sparsiattn._version import __version__
from sparsiattn.kernels.atomic_io import replacing

FORMAT = 1
NAME = "tuning.json"
PRICE = ("call", "mac", "logit", "byte", "row")


class TuningIgnored(UserWarning):
    """The tuning file could not be used; shipped constants stand in."""


_LOCK = threading.Lock()
_read: dict[Path, dict[str, Any]] = {}
_fault: dict[Path, str] = {}


def path() -> Path:
    """Where the tuning file is, or would be."""
    own = os.environ.get("SPARSIATTN_CACHE")
    if own:
        return Path(own) / NAME
    base = os.environ.get("XDG_CACHE_HOME")
    # expanduser leaves "~" where there is no home; it raises nothing
    root = Path(base) if base else Path(os.path.expanduser("~"), ".cache")
    return root / "sparsiattn" / NAME


def key(device: torch.device, dtype: torch.dtype) -> str:
    """What an entry holds for: machine, versions, dtype."""
    return " | ".join(
        (device_name(device), f"torch {torch.__version__}", f"sparsiattn {__version__}",
         str(dtype).removeprefix("torch."))
    )  # fmt: skip


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's with the number of threads in use.

    >>> device_name(torch.device("cpu")).startswith("cpu ")
    True
    """
    if device.type == "cuda":
        return f"cuda {torch.cuda.get_device_name(device)}"
    if device.type == "cpu":
        return f"cpu {processor()}, {torch.get_num_threads()} threads"
    return device.type


@cache
def processor() -> str:
    """The processor's name, as the system gives it."""
    import platform

    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def find(device: torch.device, dtype: torch.dtype) -> dict[str, Any] | None:
    """The entry for a device and dtype, None if there is none that can be used."""
    entry = _entries(path()).get(key(device, dtype))
    return entry if isinstance(entry, dict) else None


def fault() -> str | None:
    """Why the tuning file is ignored, None if it is not."""
    _entries(path())
    return _fault.get(path())


def forget() -> None:
    """Read the file again when it is needed next; a fault warns again."""
    with _LOCK:
        _read.clear()
        _fault.clear()


def _entries(where: Path) -> dict[str, Any]:
    with _LOCK:
        if where not in _read:
            try:
                _read[where] = _parse(where)
            except (OSError, ValueError) as error:
                _read[where] = {}
                _ignore(where, f"{type(error).__name__}: {error}")
        return _read[where]


def _ignore(where: Path, why: str) -> None:
    _fault[where] = f"{where} is ignored ({why}); run `sparsiattn tune` to write it anew"
    warnings.warn(_fault[where], TuningIgnored, stacklevel=4)


def _parse(where: Path) -> dict[str, Any]:
    """The file's entries, checked; `ValueError` names what is wrong with it."""
    try:
        text = where.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return {}
    content = json.loads(text)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"not a tuning file of format {FORMAT}")
    entries = content.get("entries")
    if not isinstance(entries, dict):
        raise ValueError("it has no entries")
    for name, entry in entries.items():
        _check(name, entry)
    return entries


def _check(name: str, entry: Any) -> None:
    prices = entry.get("prices") if isinstance(entry, dict) else None
    rows = entry.get("rows") if isinstance(entry, dict) else None
    if not isinstance(prices, dict) or not isinstance(rows, list):
        raise ValueError(f"entry {name!r} has no prices or no rows")
    for kernel, price in prices.items():
        fits = isinstance(price, dict) and sorted(price) == sorted(PRICE)
        if not fits or not all(_is_price(value) for value in price.values()):
            raise ValueError(f"entry {name!r}: {kernel!r} needs {len(PRICE)} positive prices")


def _is_price(value: object) -> bool:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    return math.isfinite(value) and value > 0


def write(entries: dict[str, Any]) -> Path | None:
    """Add entries to the file, all at once or not at all; None and a warning if that fails, and
    then they hold in this process only.

    Entries of other machines and versions stay; a file that could not be read is replaced.
    """
    where = path()
    with _LOCK:
        try:
            known = _parse(where)
        except (OSError, ValueError):
            known = {}
        _read[where] = {**known, **entries}
        _fault.pop(where, None)
        content = {"format": FORMAT, "entries": _read[where]}
        try:
            where.parent.mkdir(parents=True, exist_ok=True)
            text = json.dumps(content, indent=1, allow_nan=False) + "\n"
            with replacing(where, shared=True) as temporary:
                temporary.write_text(text, encoding="utf-8")
        except OSError as error:
            _ignore(where, f"it cannot be written: {type(error).__name__}: {error}")
            return None
    return where
