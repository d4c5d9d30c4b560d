"""Lists of the registered strategies, kernels, backbones and plug-ins."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from typing import Any

from sparsiattn.errors import renamed_property
from sparsiattn.registry.registry import REGISTRY, PluginInfo


@dataclass(frozen=True)
class Info:
    """A registered strategy, kernel or backbone, and whether it works on this machine.

    Attributes:
        name: The name that selects it.
        summary: One sentence about it.
        plugin: The plug-in that registered it.
        reasons: Why it does not work on this machine; empty if it does.
        needs_training: Whether a strategy must be trained or calibrated.
        inexact_reason: Why a strategy differs from the dense model at full budget; empty if it
            does not.
        kind: What a strategy reduces: ``"attention"``, ``"tokens"`` or ``"both"``.
        paper: URL of the publication.
        fidelity: How closely it follows the publication.
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

    inexact = renamed_property("inexact", "inexact_reason")

    @property
    def usable(self) -> bool:
        """Whether it works on this machine."""
        return not self.reasons


def list_strategies() -> dict[str, Info]:
    """Registered strategies by name.

    >>> list_strategies()["topk"].needs_training
    False
    """
    return _infos("strategies")


def list_kernels() -> dict[str, Info]:
    """Registered kernels by name; ``usable`` and ``reasons`` refer to this machine.

    >>> list_kernels()["reference"].usable
    True
    """
    return _infos("kernels")


def list_backbones() -> dict[str, Info]:
    """Registered backbone adapters by name, in the order in which they are tried.

    >>> list(list_backbones())[-1]
    'generic'
    """
    return _infos("backbones")


def list_plugins() -> dict[str, PluginInfo]:
    """Plug-ins by name; broken plug-ins have the error.

    A second plug-in of the same name is listed as ``name (distribution)``.

    >>> [name for name, plugin in list_plugins().items() if plugin.broken]
    []
    """
    plugins: dict[str, PluginInfo] = {}
    for plugin in REGISTRY.plugins():
        name = plugin.name
        plugins[f"{name} ({plugin.distribution})" if name in plugins else name] = plugin
    return plugins


def _infos(kind: str) -> dict[str, Info]:
    return {name: _info(kind, name, entry) for name, entry in REGISTRY.all(kind).items()}


def _info(kind: str, name: str, entry: Any) -> Info:
    stated = {f.name: getattr(entry, f.name) for f in fields(Info) if hasattr(entry, f.name)}
    return Info(
        **{
            **stated,
            "name": name,
            "summary": stated.get("summary") or _first_sentence(entry.__doc__ or ""),
            "plugin": REGISTRY.plugin_of(kind, name),
            "reasons": _reasons(entry) if kind == "kernels" else (),
        }
    )


def _reasons(kernel: Any) -> tuple[str, ...]:
    """Why a kernel cannot run on this machine; an error in ``why_unavailable`` is a reason too."""
    try:
        return tuple(kernel.why_unavailable())
    except Exception as error:
        return (f"why_unavailable() raised {type(error).__name__}: {error}",)


def _first_sentence(docstring: str) -> str:
    """The first sentence of a docstring, on one line."""
    paragraph = " ".join(docstring.strip().split("\n\n")[0].split())
    # do not split after abbreviations
    first = re.split(r"(?<!\beq)(?<!i\.e)(?<!e\.g)(?<!arXiv)\. ", paragraph)[0]
    return first.rstrip(".") + "." if first else ""
