"""Whether this process has loaded compiled code. `native.build` sets it; prices depend on it."""

from __future__ import annotations

_loaded = False


def is_loaded() -> bool:
    """Whether compiled code is loaded; reads no files, so that a compiler can trace it."""
    return _loaded


def set_loaded(loaded: bool) -> None:
    """Record that compiled code was loaded or forgotten."""
    global _loaded
    _loaded = loaded
