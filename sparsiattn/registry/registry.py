"""What is registered: built-ins and plug-ins through the same hooks, faults kept apart.

A plug-in that fails to import, misspells a hook, raises in one or brings a name that is taken is
listed as broken with its distribution and its error, and stops nothing else.
"""

from __future__ import annotations

import importlib
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import pluggy

from sparsiattn.errors import PluginError, unknown
from sparsiattn.registry import hookspecs
from sparsiattn.registry.hookspecs import PLUGIN_API, PROJECT

METHODS = "sparsiattn.methods"
BUILTINS = ("sparsiattn.strategies", METHODS, "sparsiattn.kernels", "sparsiattn_backbones")
# What each hook returns, in words. The classes stand above this module: `registers_as` names their
# kind, so that the registry need not import them.
REQUIREMENTS = {
    "strategies": "a frozen dataclass derived from sparsiattn.Strategy or sparsiattn.TokenStrategy",
    "kernels": "an instance of sparsiattn.Kernel",
    "backbones": "an instance of sparsiattn.Backbone",
}
KINDS = tuple(REQUIREMENTS)
# A plug-in must not stop the others, also where it is a script that calls sys.exit().
ISOLATED = (Exception, SystemExit)


@dataclass(frozen=True)
class PluginInfo:
    """A plug-in and what it registered, or the error that broke it.

    Attributes:
        name: Name of its entry point; of a built-in, its package.
        distribution: The installed distribution that brings it.
        provides: Names of the strategies, kernels and backbones that it registered.
        error: What broke it, None if it works.
        module: The module that its entry point names.
    """

    name: str
    distribution: str
    provides: tuple[str, ...] = ()
    error: BaseException | None = None
    module: str = field(default="", compare=False)

    @property
    def broken(self) -> bool:
        """Whether an error keeps it, or a part of it, from working."""
        return self.error is not None


@dataclass
class _Contents:
    """One consistent reading of all plug-ins."""

    registered: dict[str, dict[str, Any]]
    origin: dict[tuple[str, str], str] = field(default_factory=dict)
    errors: dict[str, BaseException] = field(default_factory=dict)


class Registry:
    """The plug-in manager with isolation. One instance serves the process; see `REGISTRY`."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._manager: pluggy.PluginManager | None = None
        self._loaded: dict[str, PluginInfo] = {}
        self._failed: list[PluginInfo] = []
        self._contents: _Contents | None = None

    def all(self, kind: str) -> dict[str, Any]:
        """Name to strategy class, kernel or backbone, in order of registration.

        Args:
            kind: ``"strategies"``, ``"kernels"`` or ``"backbones"``.
        """
        return self._read().registered[kind]

    def get(self, kind: str, name: str) -> Any:
        """The strategy class, kernel or backbone of that name.

        Raises:
            UnknownName: Nothing of that kind has that name.
        """
        registered = self.all(kind)
        if not isinstance(name, str) or name not in registered:
            raise unknown(kind[:-3] + "y" if kind == "strategies" else kind[:-1], name, registered)
        return registered[name]

    def plugin_of(self, kind: str, name: str) -> str:
        """Name of the plug-in that registered it."""
        return self._read().origin[kind, name]

    def plugins(self) -> list[PluginInfo]:
        """Every plug-in, the built-in ones first, those that could not be loaded last."""
        contents = self._read()
        loaded = [
            replace(
                plugin,
                provides=tuple(n for (_, n), by in contents.origin.items() if by == plugin.name),
                error=contents.errors.get(plugin.name),
            )
            for plugin in self._loaded.values()
        ]
        return loaded + self._failed

    def of_package(self, package: str) -> list[PluginInfo]:
        """The plug-ins of a package, broken ones too.

        Args:
            package: Name of the distribution, of an entry point or of the module that this names.
        """
        return [
            plugin
            for plugin in self.plugins()
            if canonical(plugin.distribution) == canonical(package)
            or package in (plugin.name, plugin.module.partition(".")[0])
        ]

    @contextmanager
    def temporary(self, plugin: object, name: str = "temporary") -> Iterator[None]:
        """Register a plug-in for the duration of a block (for tests and notebooks)."""
        with self._lock:
            self._load().register(plugin, name)
            self._loaded[name] = PluginInfo(name, PROJECT, module=name)
            self._contents = None
        try:
            yield
        finally:
            with self._lock:
                self._load().unregister(plugin)
                del self._loaded[name]
                self._contents = None

    def _load(self) -> pluggy.PluginManager:
        with self._lock:
            if self._manager is None:
                manager = pluggy.PluginManager(PROJECT)
                manager.add_hookspecs(hookspecs)
                for name in BUILTINS:
                    manager.register(importlib.import_module(name), name)
                    self._loaded[name] = PluginInfo(name, PROJECT, module=name)
                for entry in _entry_points():
                    self._load_entry(manager, entry)
                self._manager = manager
            return self._manager

    def _load_entry(self, manager: pluggy.PluginManager, entry: EntryPoint) -> None:
        distribution = entry.dist.name if entry.dist else "unknown distribution"
        info = PluginInfo(entry.name, distribution, module=entry.module)
        try:
            if manager.has_plugin(entry.name):
                raise PluginError(
                    f"plug-in name {entry.name!r} of {distribution} is taken by "
                    f"{self._loaded[entry.name].distribution}"
                )
            plugin = entry.load()
            # before its hooks: one of a later version would be taken for a misspelt name
            _check_version(plugin, entry.name)
            manager.register(plugin, entry.name)
            _refuse_mistakes(manager, plugin, entry.name)
        except ISOLATED as error:
            self._failed.append(replace(info, error=error))
        else:
            self._loaded[entry.name] = info

    def _read(self) -> _Contents:
        with self._lock:
            manager = self._load()
            if self._contents is None:
                contents = _Contents({kind: {} for kind in KINDS})
                for name, plugin in manager.list_name_plugin():
                    for kind in KINDS:
                        self._collect(kind, name, plugin, contents)
                # the generic adapter takes every model: those of plug-ins are asked before it
                backbones = sorted(
                    contents.registered["backbones"].items(),
                    key=lambda item: contents.origin["backbones", item[0]] in BUILTINS,
                )
                contents.registered["backbones"] = dict(backbones)
                self._contents = contents
            return self._contents

    def _collect(self, kind: str, name: str, plugin: Any, contents: _Contents) -> None:
        """Add what one plug-in returns from one hook; a fault is recorded, not raised."""
        hook = f"{PROJECT}_{kind}"
        try:
            # pluggy would call all plug-ins at once: one by one, a fault is known to be its own
            for implementation in getattr(self._load().hook, hook).get_hookimpls():
                if implementation.plugin is plugin:
                    entries = implementation.function()
                    if not isinstance(entries, (list, tuple)):
                        raise PluginError(
                            f"plug-in {name!r}: {hook}() must return a list, got {entries!r}"
                        )
                    for entry in entries:
                        self._add(kind, name, entry, contents)
        except ISOLATED as error:
            contents.errors.setdefault(name, error)

    def _add(self, kind: str, plugin: str, entry: Any, contents: _Contents) -> None:
        name = _checked_name(kind, plugin, entry)
        taken = contents.origin.get((kind, name))
        if taken is not None:
            first, second = (self._loaded[key].distribution for key in (taken, plugin))
            raise PluginError(
                f"{kind}: name {name!r} of plug-in {plugin!r} ({second}) is taken by {taken!r} "
                f"({first}); choose another name"
            )
        contents.registered[kind][name] = entry
        contents.origin[kind, name] = plugin


def _entry_points() -> list[EntryPoint]:
    """Entry points of the group that ``SPARSIATTN_PLUGINS`` lets through.

    Unset: all. Empty: none. ``a,b``: only these. ``-a``: all but a.
    """
    entries = sorted(entry_points(group=PROJECT), key=lambda entry: entry.name)
    choice = os.environ.get("SPARSIATTN_PLUGINS")
    if choice is None:
        return entries
    names = [name.strip() for name in choice.split(",") if name.strip()]
    if names and all(name.startswith("-") for name in names):
        return [entry for entry in entries if f"-{entry.name}" not in names]
    return [entry for entry in entries if entry.name in names]


def canonical(name: str) -> str:
    """A distribution's name as package indices compare it.

    >>> canonical("My_Package.X")
    'my-package-x'
    """
    return re.sub(r"[-_.]+", "-", name).lower()


def _check_version(plugin: Any, name: str) -> None:
    """Refuse a plug-in of another major version, or of a minor version that is still to come."""
    api = getattr(plugin, "SPARSIATTN_API", PLUGIN_API)
    major, minor = PLUGIN_API
    offered = [(major, n) for n in range(minor + 1)]
    if not isinstance(api, (tuple, list)) or tuple(api) not in offered:
        raise PluginError(
            f"plug-in {name!r} needs plug-in API {api!r} (SPARSIATTN_API), this sparsiattn has "
            f"{PLUGIN_API}: upgrade the older of the two"
        )


def _refuse_mistakes(manager: pluggy.PluginManager, plugin: Any, name: str) -> None:
    """Unregister a plug-in that implements no hook, or one nobody calls (a misspelt name)."""
    try:
        manager.check_pending()
        if not manager.get_hookcallers(plugin):
            hooks = ", ".join(f"{PROJECT}_{kind}()" for kind in KINDS)
            raise PluginError(
                f"plug-in {name!r} implements no hook: mark one of {hooks} with "
                "@sparsiattn.hookimpl"
            )
    except ISOLATED:
        manager.unregister(plugin)
        raise


def _checked_name(kind: str, plugin: str, entry: Any) -> str:
    """The name under which a hook's entry is registered; raises where it is not of its kind."""
    is_class = isinstance(entry, type)
    fits = getattr(entry, "registers_as", "") == kind and is_class == (kind == "strategies")
    if fits and is_class:
        # looked up in the class itself: an undecorated subclass would lose its own options
        fits = getattr(vars(entry).get("__dataclass_params__"), "frozen", False)
    name = getattr(entry, "name", "")
    if not fits or not isinstance(name, str) or not name:
        raise PluginError(
            f"plug-in {plugin!r}: {PROJECT}_{kind}() must return {REQUIREMENTS[kind]} with a "
            f"name, got {entry!r}"
        )
    return name


REGISTRY = Registry()
