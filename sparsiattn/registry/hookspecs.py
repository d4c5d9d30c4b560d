"""The three hooks a plug-in can implement. Each returns a list; names must be new."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from sparsiattn.kernels.base import Kernel
    from sparsiattn.patching.discovery.backbone import Backbone
    from sparsiattn.strategies.base import Strategy

PROJECT = "sparsiattn"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def sparsiattn_strategies() -> list[type[Strategy]]:  # type: ignore[empty-body]
    """Strategy classes, each a frozen dataclass with a ``name``."""


@hookspec
def sparsiattn_kernels() -> list[Kernel]:  # type: ignore[empty-body]
    """Kernel instances."""


@hookspec
def sparsiattn_backbones() -> list[Backbone]:  # type: ignore[empty-body]
    """Backbone instances; the first registered one that fits a model is taken."""
