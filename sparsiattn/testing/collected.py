"""Test classes for all that one package registers; what ``pytest --sparsiattn-suite`` collects.

What a suite cannot know about a thing, the thing may say in a mapping named ``suite``, see `KEYS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from torch import nn

import sparsiattn_pytest
from sparsiattn.errors import UnknownName, unknown
from sparsiattn.patching.discovery.backbone import backbone_of
from sparsiattn.registry.registry import KINDS, REGISTRY, PluginInfo
from sparsiattn.strategies.config import Config
from sparsiattn.testing.backbone import BackboneSuite
from sparsiattn.testing.hosts import own_vit, tiny_vit, windowed_vit
from sparsiattn.testing.kernel import KernelSuite
from sparsiattn.testing.strategy import StrategySuite
from sparsiattn.testing.tokens import TokenStrategySuite

KEYS = {
    "strategies": ("options", "identity", "ordered", "compiles", "changes", "unread", "tolerance"),
    "kernels": ("dtypes", "device"),
    "backbones": ("model",),
}
# the budgets that keep all tokens, by the names that options usually have
FULL = {"keep": 1.0, "r": 0}


def classes(package: str) -> dict[str, type]:
    """Test classes by name for all that the package registers.

    >>> "TestStrategy_topk" in classes("sparsiattn")
    True
    """
    plugins = REGISTRY.of_package(package)
    found: dict[str, type] = {"TestPlugins": _plugins(plugins)}
    names = {plugin.name for plugin in plugins}
    for kind in KINDS:
        for name, thing in REGISTRY.all(kind).items():
            if REGISTRY.plugin_of(kind, name) in names:
                made = _MAKE[kind](thing, _said(kind, name, thing))
                title = f"Test{_SINGULAR[kind]}_{_identifier(name)}"
                found[title] = type(title, made[:1], made[1])
    return found


def _identifier(name: str) -> str:
    return "".join(sign if sign.isalnum() else "_" for sign in name)


def _said(kind: str, name: str, thing: object) -> dict[str, Any]:
    """What a thing says in its ``suite``; `UnknownName` for a key that no suite reads."""
    said = getattr(thing, "suite", {})
    if not isinstance(said, Mapping):
        raise UnknownName(f"suite of {name!r} must be a mapping, got {said!r}")
    for key in said:
        if key not in KEYS[kind]:
            raise unknown(f"key in suite of {name!r}:", key, KEYS[kind])
    return dict(said)


def _strategy(kind: type[Config], said: dict[str, Any]) -> tuple[type, dict[str, Any]]:
    fields: dict[str, Any] = {"strategy": kind.build(said.pop("options", {}))}
    if "unread" in said:
        parts = tuple(said.pop("unread"))
        fields["unread"] = lambda self, name: name.startswith(parts)
    if kind.kind == "attention":
        return StrategySuite, {**fields, **said}
    guess = {name: full for name, full in FULL.items() if name in kind.option_names()}
    ordered = said.pop("ordered", False)
    fields |= {"identity": guess, "ordered": lambda self: ordered}
    return TokenStrategySuite, {**fields, **said}


def _kernel(kernel: Any, said: dict[str, Any]) -> tuple[type, dict[str, Any]]:
    return KernelSuite, {"kernel": kernel, **said}


def _backbone(backbone: Any, said: dict[str, Any]) -> tuple[type, dict[str, Any]]:
    given = said.get("model")

    def model(self: object) -> nn.Module:
        for make in (tiny_vit, windowed_vit, own_vit) if given is None else (given,):
            host: nn.Module = make()
            if given is not None or backbone_of(host).name == backbone.name:
                return host
        pytest.skip("give a function that makes a small model: suite = {'model': ...}")

    return BackboneSuite, {"backbone": backbone, "model": model}


_MAKE: dict[str, Any] = {"strategies": _strategy, "kernels": _kernel, "backbones": _backbone}
_SINGULAR = {"strategies": "Strategy", "kernels": "Kernel", "backbones": "Backbone"}


def _plugins(plugins: list[PluginInfo]) -> type:
    """The package's plug-ins themselves: whole and not empty."""

    class TestPlugins:
        @pytest.mark.parametrize("plugin", plugins, ids=lambda plugin: plugin.name)
        def test_is_whole(self, plugin: PluginInfo) -> None:
            assert plugin.error is None, f"{plugin.name}: {plugin.error!r}"

        def test_something_is_registered(self) -> None:
            assert any(plugin.provides for plugin in plugins)

    return TestPlugins


if sparsiattn_pytest.package():
    globals().update(classes(sparsiattn_pytest.package()))
