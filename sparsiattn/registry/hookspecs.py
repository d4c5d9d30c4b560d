"""The three hooks that a plug-in can implement, and the version of that interface.

Each hook returns a list of objects, whose names must not be registered yet.
"""

from __future__ import annotations

from typing import Any

import pluggy

PROJECT = "sparsiattn"
PLUGIN_API = (1, 0)
"""Version ``(major, minor)`` of the plug-in interface of this version of sparsiattn.

A plug-in's module states the version that it was written for: ``SPARSIATTN_API = (1, 0)``. The
minor number increases when something is added to the interface, the major number when something is
changed or removed.
"""

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def sparsiattn_strategies() -> list[type]:  # type: ignore[empty-body]
    """Return strategy classes, each a frozen dataclass with a ``name``."""


@hookspec
def sparsiattn_kernels() -> list[Any]:  # type: ignore[empty-body]
    """Return kernel instances."""


@hookspec
def sparsiattn_backbones() -> list[Any]:  # type: ignore[empty-body]
    """Return backbone instances; the first registered one that fits a model is used."""
