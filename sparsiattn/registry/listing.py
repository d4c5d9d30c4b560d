"""What can be asked for by name here: strategies, kernels, backbones and plug-ins."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from sparsiattn.kernels.base import reasons_of
from sparsiattn.registry.registry import REGISTRY, PluginInfo


@dataclass(frozen=True)
class Info:
    """A registered thing: what it is for, where it comes from, and whether it works here.

    kind: what a strategy makes fewer of (``"attention"``, ``"tokens"``, ``"both"``). paper,
    fidelity: where it was published, and how close to that it is.
    """

    name: str
    summary: str
    plugin: str
    reasons: tuple[str, ...] = ()
    needs_training: bool = False
    inexact_reason: str = ""
    kind: str = ""
    paper: str = ""
    fidelity: str = ""

    @property
    def usable(self) -> bool:
        return not self.reasons


def _info(kind: str, name: str, thing: Any) -> Info:
    summary = getattr(thing, "summary", "") or _first_sentence(thing.__doc__ or "")
    reasons = tuple(reasons_of(thing)) if kind == "kernels" else ()
    return Info(
        name,
        summary,
        REGISTRY.plugin_of(kind, name),
        reasons,
        getattr(thing, "needs_training", False),
        getattr(thing, "inexact_reason", ""),
        getattr(thing, "kind", ""),
        getattr(thing, "paper", ""),
        getattr(thing, "fidelity", ""),
    )


def _first_sentence(doc: str) -> str:
    """Of a docstring, on one line."""
    paragraph = " ".join(doc.strip().split("\n\n")[0].split())
    # not after abbreviations
    first = re.split(r"(?<!\beq)(?<!i\.e)(?<!e\.g)(?<!arXiv)\. ", paragraph)[0]
    return first.rstrip(".") + "." if first else ""


def _infos(kind: str) -> dict[str, Info]:
    return {name: _info(kind, name, thing) for name, thing in REGISTRY.all(kind).items()}


def strategies() -> dict[str, Info]:
    """Registered strategies by name.

    >>> strategies()["topk"].needs_training
    False
    """
    return _infos("strategies")


def kernels() -> dict[str, Info]:
    """Registered kernels by name; ``usable`` and ``reasons`` speak of this machine.

    >>> kernels()["reference"].usable
    True
    """
    return _infos("kernels")


def backbones() -> dict[str, Info]:
    """Registered backbone adapters by name, in the order in which they are tried.

    >>> list(backbones())[-1]
    'generic'
    """
    return _infos("backbones")


def plugins() -> dict[str, PluginInfo]:
    """Plug-ins by name, the broken ones with the error that broke them; a second one of the same
    name as ``name (distribution)``.

    >>> [name for name, plugin in plugins().items() if plugin.broken]
    []
    """
    found: dict[str, PluginInfo] = {}
    for plugin in REGISTRY.plugins():
        name = plugin.name
        found[f"{name} ({plugin.distribution})" if name in found else name] = plugin
    return found
