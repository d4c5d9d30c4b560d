"""A plug-in for the duration of a block."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace

from sparsiattn.kernels.base import Kernel
from sparsiattn.patching.discovery.backbone import Backbone
from sparsiattn.registry.hookspecs import hookimpl
from sparsiattn.registry.registry import REGISTRY
from sparsiattn.strategies.base import Strategy


@contextmanager
def temporary_plugin(
    *,
    strategies: Iterable[type[Strategy]] = (),
    kernels: Iterable[Kernel] = (),
    backbones: Iterable[Backbone] = (),
    name: str = "temporary",
) -> Iterator[None]:
    """Register strategies, kernels and backbones for the duration of a block.

    What would make an installed plug-in a broken one is raised here: `PluginError` for a wrong
    type, a missing name or one that is taken.

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
        _raise_fault(name)
        yield


def _raise_fault(name: str) -> None:
    for info in REGISTRY.plugins():
        if info.name == name and info.error is not None:
            raise info.error


def _returning(things: list[object]) -> object:
    @hookimpl
    def hook() -> list[object]:
        return things

    return hook
