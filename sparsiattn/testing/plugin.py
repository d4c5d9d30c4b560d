"""Register a plug-in for the duration of a with block."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from sparsiattn.kernels import Kernel
from sparsiattn.patching import Backbone
from sparsiattn.registry import REGISTRY, hookimpl
from sparsiattn.strategies import Strategy


@contextmanager
def temporary_plugin(
    *,
    strategies: Iterable[type[Strategy]] = (),
    kernels: Iterable[Kernel] = (),
    backbones: Iterable[Backbone] = (),
    name: str = "temporary",
) -> Iterator[None]:
    """Register strategies, kernels and backbones for the duration of a block.

    Args:
        strategies: Strategy classes.
        kernels: Kernel instances.
        backbones: Backbone instances.
        name: Name of the plug-in.

    Raises:
        PluginError: An object has a wrong type or no name, or its name is taken.

    >>> from dataclasses import dataclass
    >>> import sparsiattn
    >>> @dataclass(frozen=True)
    ... class Mine(sparsiattn.Strategy):
    ...     name = "mine"
    >>> with temporary_plugin(strategies=[Mine]):
    ...     "mine" in sparsiattn.list_strategies()
    True
    >>> "mine" in sparsiattn.list_strategies()
    False
    """
    lists = {"strategies": strategies, "kernels": kernels, "backbones": backbones}
    hooks = {f"sparsiattn_{kind}": _returning(list(things)) for kind, things in lists.items()}
    with REGISTRY.temporary(SimpleNamespace(**hooks), name):
        for plugin in REGISTRY.plugins():
            if plugin.name == name and plugin.error is not None:
                raise plugin.error
        yield


@contextmanager
def registered(kind: str, thing: Any) -> Iterator[None]:
    """Make sure that a strategy, kernel or backbone is registered inside the block."""
    if thing.name in REGISTRY.all(kind):
        yield
    else:
        plugin: Any = {kind: [thing]}
        with temporary_plugin(**plugin, name="under-test"):
            yield


def _returning(things: list[object]) -> object:
    @hookimpl
    def hook() -> list[object]:
        return things

    return hook
