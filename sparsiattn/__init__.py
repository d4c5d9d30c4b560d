"""Sparse attention for any Vision Transformer: patch at run time, undo in one call.

The import is lazy (PEP 562): public names, and torch with them, are imported at their first use.
``__init__.pyi`` lists the names and their modules.
"""

from __future__ import annotations

from importlib import import_module, util
from typing import Any

import lazy_loader

# Deprecated names and the present ones; using an old one warns.
_RENAMED = {
    "Bench": "BenchResult",
    "Exported": "ExportResult",
    "LearnedTokens": "LearnedTokenPlanner",
    "Shown": "AttentionView",
    "backbones": "list_backbones",
    "plugins": "list_plugins",
}

_import_name, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str) -> Any:
    """Import a public name or a sub-package at its first use."""
    if name == "__version__":  # reading it takes 50 ms, and `sparsiattn --help` imports the root
        return import_module("sparsiattn._version").__version__
    if name in _RENAMED:
        errors = import_module("sparsiattn.errors")
        errors.warn_renamed(f"sparsiattn.{name}", f"sparsiattn.{_RENAMED[name]}")
        name = _RENAMED[name]
    if name in __all__:
        return _import_name(name)
    if util.find_spec(f"{__name__}.{name}"):
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
