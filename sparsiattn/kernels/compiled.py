"""Whether this process has compiled native code: `native.build` says so, prices depend on it."""

from __future__ import annotations

_loaded = False


def is_loaded() -> bool:
    """Whether there is compiled code; looks nowhere, so a compiler can trace it."""
    return _loaded


def set_loaded(loaded: bool) -> None:
    """Say that compiled code was loaded, or forgotten."""
    global _loaded
    _loaded = loaded
