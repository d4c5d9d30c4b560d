"""The three hooks a plug-in can implement, and the version of that interface.

Each hook returns a list; names must be new.
"""

from __future__ import annotations

from typing import Any

import pluggy

PROJECT = "sparsiattn"
PLUGIN_API = (1, 0)
"""``(major, minor)`` of the interface that this version of sparsiattn offers to plug-ins.

A plug-in states the version that it was written for beside its hooks: ``SPARSIATTN_API = (1, 0)``.
The minor number grows when something is added that a plug-in may use, the major number when
something is changed or taken away that a plug-in may have used.
"""

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def sparsiattn_strategies() -> list[type]:  # type: ignore[empty-body]
    """Strategy classes, each a frozen dataclass with a ``name``."""


@hookspec
def sparsiattn_kernels() -> list[Any]:  # type: ignore[empty-body]
    """Kernel instances."""


@hookspec
def sparsiattn_backbones() -> list[Any]:  # type: ignore[empty-body]
    """Backbone instances; the first registered one that fits a model is taken."""
