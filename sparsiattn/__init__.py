"""Sparse attention for any Vision Transformer: patch at run time, undo in one call.

This import is light (PEP 562): a public name is imported, and torch with it, where it is first
used. ``__init__.pyi`` lists the names and says where each one lives.
"""

from __future__ import annotations

import warnings
from importlib import import_module, util
from typing import Any

import lazy_loader

# Names of earlier versions, with a warning until the next minor version.
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
    """A public name, imported now and kept, or a sub-package."""
    if name == "__version__":  # reading it takes 50 ms, and `sparsiattn --help` imports the root
        return import_module("sparsiattn._version").__version__
    if name in _RENAMED:
        warnings.warn(
            f"sparsiattn.{name} is deprecated: use sparsiattn.{_RENAMED[name]}",
            DeprecationWarning,
            stacklevel=2,
        )
        name = _RENAMED[name]
    if name in __all__:
        return _import_name(name)
    if util.find_spec(f"{__name__}.{name}"):
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
