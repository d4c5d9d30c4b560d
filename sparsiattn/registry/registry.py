"""What is registered: built-ins and plug-ins through the same hooks, faults kept apart.

A plug-in that fails to import, misspells a hook, raises in one or brings a name that is taken is
listed as broken with its distribution and its error, and stops nothing else.
"""

from __future__ import annotations

import importlib
import os
import re
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

import pluggy

from sparsiattn.errors import PluginError, unknown
from sparsiattn.registry import hookspecs
from sparsiattn.registry import plugin_api as pluginapi
from sparsiattn.registry.hookspecs import PROJECT
from sparsiattn.registry.plugin_api import PLUGIN_API, Version

METHODS = "sparsiattn.methods"
BUILTINS = (
    "sparsiattn.strategies", METHODS, "sparsiattn.kernels", "sparsiattn_backbones",
)  # fmt: skip
KINDS = ("strategies", "kernels", "backbones")
# what a plug-in may do without stopping the others: a script as plug-in may call sys.exit()
ISOLATED = (Exception, SystemExit)


@dataclass(frozen=True)
class PluginInfo:
    """A plug-in and what it registered, or the error that broke it.

    api: the `PLUGIN_API` it was written for. deprecation: what its author should know about that,
    mostly nothing. module: what its entry point names.
    """

    name: str
    distribution: str
    provides: tuple[str, ...] = ()
    error: BaseException | None = None
    api: Version = field(default=PLUGIN_API, compare=False)
    deprecation: str = field(default="", compare=False)
    module: str = field(default="", compare=False)

    @property
    def broken(self) -> bool:
        return self.error is not None


@dataclass
class _Contents:
    """One consistent reading of all plug-ins."""

    things: dict[str, dict[str, Any]] = field(default_factory=lambda: {kind: {} for kind in KINDS})
    origin: dict[tuple[str, str], str] = field(default_factory=dict)
    errors: dict[str, BaseException] = field(default_factory=dict)


class Registry:
    """The plug-in manager with isolation. One instance serves the process; see `REGISTRY`."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._manager: pluggy.PluginManager | None = None
        self._distributions: dict[str, str] = {}
        self._modules: dict[str, str] = {}
        self._apis: dict[str, Version] = {}
        self._failed: list[PluginInfo] = []
        self._contents: _Contents | None = None

    def all(self, kind: str) -> dict[str, Any]:
        """Name to strategy class, kernel or backbone, in order of registration."""
        return self._read().things[kind]

    def get(self, kind: str, name: str) -> Any:
        things = self.all(kind)
        if not isinstance(name, str) or name not in things:
            raise unknown(kind[:-3] + "y" if kind == "strategies" else kind[:-1], name, things)
        return things[name]

    def plugin_of(self, kind: str, name: str) -> str:
        return self._read().origin[kind, name]

    def plugins(self) -> list[PluginInfo]:
        contents = self._read()
        loaded = [self._described(name, contents) for name, _ in self._load().list_name_plugin()]
        return loaded + self._failed

    def of_package(self, package: str) -> list[PluginInfo]:
        """The plug-ins of a package, broken ones too, by the name of its distribution, of an entry
        point or of the module that this names."""
        return [
            plugin
            for plugin in self.plugins()
            if canonical(plugin.distribution) == canonical(package)
            or package == plugin.name
            or plugin.module.partition(".")[0] == package
        ]

    def _described(self, name: str, contents: _Contents) -> PluginInfo:
        api = self._apis.get(name, PLUGIN_API)
        return PluginInfo(
            name,
            self._distributions.get(name, PROJECT),
            tuple(n for (_, n), origin in contents.origin.items() if origin == name),
            contents.errors.get(name),
            api,
            pluginapi.deprecation(api),
            self._modules.get(name, name),
        )

    @contextmanager
    def temporary(self, plugin: object, name: str = "temporary") -> Iterator[None]:
        """Register a plug-in for the duration of a block (for tests and notebooks)."""
        with self._lock:
            self._load().register(plugin, name)
            self._contents = None
        try:
            yield
        finally:
            with self._lock:
                self._load().unregister(plugin)
                self._contents = None

    def _load(self) -> pluggy.PluginManager:
        with self._lock:
            if self._manager is None:
                manager = pluggy.PluginManager(PROJECT)
                manager.add_hookspecs(hookspecs)
                for name in BUILTINS:
                    manager.register(importlib.import_module(name), name)
                for entry in _entry_points():
                    self._load_entry(manager, entry)
                self._manager = manager
            return self._manager

    def _load_entry(self, manager: pluggy.PluginManager, entry: metadata.EntryPoint) -> None:
        distribution = entry.dist.name if entry.dist else "unknown distribution"
        try:
            if manager.has_plugin(entry.name):
                other = self._distributions.get(entry.name, PROJECT)
                raise PluginError(
                    f"plug-in name {entry.name!r} of {distribution} is taken by {other}"
                )
            plugin = entry.load()
            # first: a hook that came later would be taken for a misspelt one
            api = _accepted_version(plugin, entry.name)
            manager.register(plugin, entry.name)
            _refuse_mistakes(manager, plugin, entry.name)
        except ISOLATED as error:
            failed = PluginInfo(entry.name, distribution, error=error, module=entry.module)
            self._failed.append(failed)
        else:
            self._distributions[entry.name] = distribution
            self._modules[entry.name] = entry.module
            self._apis[entry.name] = api

    def _read(self) -> _Contents:
        with self._lock:
            manager = self._load()
            if self._contents is None:
                contents = _Contents()
                for name, plugin in manager.list_name_plugin():
                    for kind in KINDS:
                        self._collect(manager, name, plugin, kind, contents)
                # the generic adapter takes every model: those of plug-ins are asked before it
                mine = sorted(
                    contents.things["backbones"].items(),
                    key=lambda item: contents.origin["backbones", item[0]] in BUILTINS,
                )
                contents.things["backbones"] = dict(mine)
                self._contents = contents
            return self._contents

    def _collect(
        self, manager: pluggy.PluginManager, name: str, plugin: Any, kind: str, into: _Contents
    ) -> None:
        """Add what one plug-in returns from one hook; a fault is recorded, not raised."""
        hook = f"{PROJECT}_{kind}"
        try:
            # implementations one by one: the fault of one plug-in is known to be its own
            for implementation in getattr(manager.hook, hook).get_hookimpls():
                if implementation.plugin is plugin:
                    for thing in _listed(implementation.function(), hook, name):
                        self._add(thing, name, kind, into)
        except ISOLATED as error:
            into.errors.setdefault(name, error)

    def _add(self, thing: Any, plugin: str, kind: str, into: _Contents) -> None:
        name = _checked_name(thing, kind, plugin)
        taken = into.origin.get((kind, name))
        if taken is not None:
            first, second = (self._distributions.get(p, PROJECT) for p in (taken, plugin))
            raise PluginError(
                f"{kind}: name {name!r} of plug-in {plugin!r} ({second}) is taken by {taken!r} "
                f"({first}); choose another name"
            )
        into.things[kind][name] = thing
        into.origin[kind, name] = plugin


def _entry_points() -> list[metadata.EntryPoint]:
    """Entry points of the group that ``SPARSIATTN_PLUGINS`` lets through.

    Unset: all. Empty: none. ``a,b``: only these. ``-a``: all but a.
    """
    found = sorted(_installed(), key=lambda entry: entry.name)
    wanted = os.environ.get("SPARSIATTN_PLUGINS")
    if wanted is None:
        return found
    names = [name.strip() for name in wanted.split(",") if name.strip()]
    if names and all(name.startswith("-") for name in names):
        return [entry for entry in found if f"-{entry.name}" not in names]
    return [entry for entry in found if entry.name in names]


def _installed() -> list[metadata.EntryPoint]:
    """Entry points of the group; distributions whose list cannot be read have none."""
    try:
        return list(metadata.entry_points(group=PROJECT))
    except Exception:  # one file that does not parse, of whatever project, hides all the others
        return [entry for dist in _distributions() for entry in _readable(dist)]


def _distributions() -> list[metadata.Distribution]:
    """One for each name: the first on the path hides the others, as at import."""
    found: dict[str, metadata.Distribution] = {}
    for dist in metadata.distributions():
        found.setdefault(canonical(dist.metadata["Name"] or ""), dist)
    return list(found.values())


def _readable(dist: metadata.Distribution) -> list[metadata.EntryPoint]:
    try:
        return list(dist.entry_points.select(group=PROJECT))
    except Exception as error:
        warnings.warn(
            f"entry points of {dist.metadata['Name']} cannot be read ({error}); reinstall it",
            RuntimeWarning,
            stacklevel=2,
        )
        return []


def canonical(name: str) -> str:
    """A distribution's name as package indices compare it.

    >>> canonical("My_Package.X")
    'my-package-x'
    """
    return re.sub(r"[-_.]+", "-", name).lower()


def _accepted_version(plugin: Any, name: str) -> Version:
    """The plug-in API that a plug-in was written for; raises where it cannot work with this one."""
    api = pluginapi.stated(plugin)
    reason = pluginapi.refusal(api)
    if reason:
        raise PluginError(f"plug-in {name!r} {reason}")
    return api


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


def _listed(result: Any, hook: str, plugin: str) -> list[Any]:
    if not isinstance(result, (list, tuple)):
        raise PluginError(f"plug-in {plugin!r}: {hook}() must return a list, got {result!r}")
    return list(result)


def _checked_name(thing: Any, kind: str, plugin: str) -> str:
    from sparsiattn.kernels.base import Kernel
    from sparsiattn.patching.discovery.backbone import Backbone
    from sparsiattn.strategies.config import Config

    if kind == "strategies":
        fits = isinstance(thing, type) and issubclass(thing, Config)
        wanted = "a frozen dataclass derived from sparsiattn.Strategy or sparsiattn.TokenStrategy"
        # looked up in the class itself: an undecorated subclass would lose its own options
        fits = fits and getattr(vars(thing).get("__dataclass_params__"), "frozen", False)
    else:
        base = Kernel if kind == "kernels" else Backbone
        fits, wanted = isinstance(thing, base), f"an instance of sparsiattn.{base.__name__}"
    name = getattr(thing, "name", "")
    if not fits or not isinstance(name, str) or not name:
        raise PluginError(
            f"plug-in {plugin!r}: {PROJECT}_{kind}() must return {wanted} with a name, "
            f"got {thing!r}"
        )
    return name


REGISTRY = Registry()
