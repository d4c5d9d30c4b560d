"""The registry of built-ins and plug-ins, which use the same hooks.

Faults are isolated: a plug-in that fails to import, misspells a hook, raises in a hook or registers
a name that is taken is listed as broken with its distribution and its error. Others still work.
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
# The objects that each hook must return, in words. Their classes are above this module; they state
# their kind with `registers_as`, so that the registry does not import them.
REQUIREMENTS = {
    "strategies": "a frozen dataclass derived from sparsiattn.Strategy or sparsiattn.TokenStrategy",
    "kernels": "an instance of sparsiattn.Kernel",
    "backbones": "an instance of sparsiattn.Backbone",
}
KINDS = tuple(REQUIREMENTS)
# Errors of a plug-in must not stop the others, not even a script that calls sys.exit().
ISOLATED = (Exception, SystemExit)


@dataclass(frozen=True)
class PluginInfo:
    """A plug-in, with the names that it registered and the error if it is broken.

    Attributes:
        name: Name of its entry point; for a built-in, its package.
        distribution: The installed distribution that contains it.
        provides: Names of the strategies, kernels and backbones that it registered.
        error: The error that broke it; None if it works.
        module: The module that its entry point refers to.
    """

    name: str
    distribution: str
    provides: tuple[str, ...] = ()
    error: BaseException | None = None
    module: str = field(default="", compare=False)

    @property
    def broken(self) -> bool:
        """Whether the plug-in, or a part of it, does not work because of an error."""
        return self.error is not None


@dataclass
class _Contents:
    """A consistent snapshot of the contents of all plug-ins."""

    registered: dict[str, dict[str, Any]]
    origin: dict[tuple[str, str], str] = field(default_factory=dict)
    errors: dict[str, BaseException] = field(default_factory=dict)


class Registry:
    """The plug-in manager with fault isolation. There is one instance per process, `REGISTRY`."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._manager: pluggy.PluginManager | None = None
        self._loaded: dict[str, PluginInfo] = {}
        self._failed: list[PluginInfo] = []
        self._contents: _Contents | None = None

    def all(self, kind: str) -> dict[str, Any]:
        """Strategy classes, kernels or backbones by name, in order of registration.

        Args:
            kind: ``"strategies"``, ``"kernels"`` or ``"backbones"``.
        """
        return self._read().registered[kind]

    def get(self, kind: str, name: str) -> Any:
        """The strategy class, kernel or backbone of a name.

        Args:
            kind: ``"strategies"``, ``"kernels"`` or ``"backbones"``.
            name: Its name.

        Raises:
            UnknownName: The name is not registered for this kind.
        """
        registered = self.all(kind)
        if not isinstance(name, str) or name not in registered:
            raise unknown(kind[:-3] + "y" if kind == "strategies" else kind[:-1], name, registered)
        return registered[name]

    def plugin_of(self, kind: str, name: str) -> str:
        """Name of the plug-in that registered a name."""
        return self._read().origin[kind, name]

    def plugins(self) -> list[PluginInfo]:
        """All plug-ins: built-ins first, plug-ins that could not be loaded last."""
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
        """The plug-ins of a package, including broken ones.

        Args:
            package: Name of the distribution, of an entry point or of the entry point's module.
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
            # checked before its hooks: a hook of a later version would look like a misspelt name
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
                # adapters of plug-ins come first, as the generic adapter takes every model
                backbones = sorted(
                    contents.registered["backbones"].items(),
                    key=lambda item: contents.origin["backbones", item[0]] in BUILTINS,
                )
                contents.registered["backbones"] = dict(backbones)
                self._contents = contents
            return self._contents

    def _collect(self, kind: str, name: str, plugin: Any, contents: _Contents) -> None:
        """Add the entries that one plug-in returns from one hook; an error is recorded."""
        hook = f"{PROJECT}_{kind}"
        try:
            # pluggy would call all plug-ins at once; called separately, an error can be attributed
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
    """Entry points of the group, filtered by the environment variable ``SPARSIATTN_PLUGINS``.

    Unset: all. Empty: none. ``a,b``: only these. ``-a``: all except a.
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
    """The normalised name of a distribution, as package indices compare names.

    >>> canonical("My_Package.X")
    'my-package-x'
    """
    return re.sub(r"[-_.]+", "-", name).lower()


def _check_version(plugin: Any, name: str) -> None:
    """Refuse a plug-in for another major version or for a later minor version."""
    api = getattr(plugin, "SPARSIATTN_API", PLUGIN_API)
    major, minor = PLUGIN_API
    offered = [(major, n) for n in range(minor + 1)]
    if not isinstance(api, (tuple, list)) or tuple(api) not in offered:
        raise PluginError(
            f"plug-in {name!r} needs plug-in API {api!r} (SPARSIATTN_API), but this sparsiattn has "
            f"{PLUGIN_API}: upgrade the older of the two"
        )


def _refuse_mistakes(manager: pluggy.PluginManager, plugin: Any, name: str) -> None:
    """Unregister a plug-in that implements no hook, or an unknown one (a misspelt name)."""
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
    """The name of an entry that a hook returned; raises if it is not of the hook's kind."""
    is_class = isinstance(entry, type)
    fits = getattr(entry, "registers_as", "") == kind and is_class == (kind == "strategies")
    if fits and is_class:
        # read from the class itself, as an undecorated subclass would lose its own options
        fits = getattr(vars(entry).get("__dataclass_params__"), "frozen", False)
    name = getattr(entry, "name", "")
    if not fits or not isinstance(name, str) or not name:
        raise PluginError(
            f"plug-in {plugin!r}: {PROJECT}_{kind}() must return {REQUIREMENTS[kind]} with a "
            f"name, got {entry!r}"
        )
    return name


REGISTRY = Registry()
