"""The test classes that ``pytest --sparsiattn-suite`` collects for everything a package registers.

A strategy, kernel or backbone may set attributes of its suite in a mapping named ``suite``, whose
keys are listed in `KEYS`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import pytest
from torch import nn

import sparsiattn_pytest
from sparsiattn.errors import UnknownName, unknown
from sparsiattn.patching.discovery.backbone import backbone_of
from sparsiattn.registry import REGISTRY, PluginInfo
from sparsiattn.registry.registry import KINDS
from sparsiattn.strategies import Config
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
# budgets that keep all tokens, by the usual names of options
FULL = {"keep": 1.0, "r": 0}


def classes(package: str) -> dict[str, type]:
    """Test classes by name for everything that a package registers.

    >>> "TestStrategy_topk" in classes("sparsiattn")
    True
    """
    plugins = REGISTRY.of_package(package)
    suites: dict[str, type] = {"TestPlugins": _plugins(plugins)}
    names = {plugin.name for plugin in plugins}
    for kind in KINDS:
        for name, thing in REGISTRY.all(kind).items():
            if REGISTRY.plugin_of(kind, name) in names:
                singular, make = _SUITES[kind]
                suite, fields = make(thing, _settings(kind, name, thing))
                title = re.sub(r"\W", "_", f"Test{singular}_{name}")
                suites[title] = type(title, (suite,), fields)
    return suites


def _settings(kind: str, name: str, thing: object) -> dict[str, Any]:
    """The mapping ``suite`` of a registered object; raises `UnknownName` for an unknown key."""
    settings = getattr(thing, "suite", {})
    if not isinstance(settings, Mapping):
        raise UnknownName(f"suite of {name!r} must be a mapping, got {settings!r}")
    for key in settings:
        if key not in KEYS[kind]:
            raise unknown(f"key in suite of {name!r}:", key, KEYS[kind])
    return dict(settings)


def _strategy(kind: type[Config], settings: dict[str, Any]) -> tuple[type, dict[str, Any]]:
    fields: dict[str, Any] = {"strategy": kind.build(settings.pop("options", {}))}
    if "unread" in settings:
        prefixes = tuple(settings.pop("unread"))
        fields["unread"] = lambda self, name: name.startswith(prefixes)
    if kind.kind == "attention":
        return StrategySuite, {**fields, **settings}
    identity = {name: full for name, full in FULL.items() if name in kind.option_names()}
    ordered = settings.pop("ordered", False)
    fields |= {"identity": identity, "ordered": lambda self: ordered}
    return TokenStrategySuite, {**fields, **settings}


def _kernel(kernel: Any, settings: dict[str, Any]) -> tuple[type, dict[str, Any]]:
    return KernelSuite, {"kernel": kernel, **settings}


def _backbone(backbone: Any, settings: dict[str, Any]) -> tuple[type, dict[str, Any]]:
    def model(self: object) -> nn.Module:
        if settings.get("model") is not None:
            host: nn.Module = settings["model"]()
            return host
        for make in (tiny_vit, windowed_vit, own_vit):
            host = make()
            if backbone_of(host).name == backbone.name:
                return host
        pytest.skip("set a function that returns a small model: suite = {'model': ...}")

    return BackboneSuite, {"backbone": backbone, "model": model}


_SUITES: dict[str, tuple[str, Any]] = {
    "strategies": ("Strategy", _strategy),
    "kernels": ("Kernel", _kernel),
    "backbones": ("Backbone", _backbone),
}


def _plugins(plugins: list[PluginInfo]) -> type:
    """A test class for the plug-ins themselves: they work and are not empty."""

    class TestPlugins:
        @pytest.mark.parametrize("plugin", plugins, ids=lambda plugin: plugin.name)
        def test_is_whole(self, plugin: PluginInfo) -> None:
            assert plugin.error is None, f"{plugin.name}: {plugin.error!r}"

        def test_something_is_registered(self) -> None:
            assert any(plugin.provides for plugin in plugins)

    return TestPlugins


if sparsiattn_pytest.package():
    globals().update(classes(sparsiattn_pytest.package()))
