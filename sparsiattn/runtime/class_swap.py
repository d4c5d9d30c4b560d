"""Swap the class of one module. Unlike a replaced ``forward``, it survives deepcopy and pickle."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from types import MethodType
from typing import Any

from torch import nn

HOST = "_sparsiattn_host"
"""Name of the attribute in which a swapped class holds the host's class."""


class Swapped:
    """Mixin of the swapped classes: pickles and copies as (class of the host, state)."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(protocol)
        swapped = HOST in vars(type(self))
        return (*creation(type(self)), *reduced[2:]) if swapped else reduced

    @staticmethod
    def members(host: Any) -> Mapping[str, Any]:
        """Members that the swapped class adds to the host's class."""
        raise NotImplementedError


class Hooked(Swapped):
    """Mixin for the class of a module with hooks of a patch; behaves as the host's class.

    Dynamo guards the types of modules, not their hooks. Without another class, the patched model
    would run the program compiled for an unpatched copy in the same process.
    """

    @staticmethod
    def members(host: Any) -> Mapping[str, Any]:
        return {}


def mark_hooked(module: nn.Module) -> None:
    """Give a module a class of its own, unless it has one already."""
    if not isinstance(module, Swapped):
        swap_class(module, Hooked)


def creation(kind: Any) -> tuple[Any, tuple[Any, ...]]:
    """A function and its arguments that create an empty object of a class, swapped or not."""
    host = vars(kind).get(HOST)
    return (_of_host, (kind,)) if host is None else (_empty, (kind.__bases__[0], host))


def _of_host(host: Any) -> Any:
    return host.__new__(host)


def _empty(mixin: Any, host: Any) -> Any:
    kind = swapped_class(mixin, host)
    return kind.__new__(kind)


@cache
def swapped_class(mixin: Any, host: Any) -> Any:
    """A subclass of the host's class, of the same name, with the mixin's members."""
    members = {**mixin.members(host), "__module__": host.__module__, HOST: host}
    return type(host.__name__, (mixin, host), members)


def swap_class(module: nn.Module, mixin: Any) -> None:
    """Give a module the swapped class, if it does not have it yet."""
    kind: Any = type(module)
    if mixin not in kind.__bases__:
        _set_class(module, swapped_class(mixin, kind))


def swap_class_back(module: nn.Module, mixin: type[Swapped]) -> None:
    """Give a module its original class back.

    If something derived another class from the swapped one meanwhile (parametrizations do), that
    class stays and behaves as the host's would.
    """
    if mixin in type(module).__bases__:
        _set_class(module, vars(type(module))[HOST])


def _set_class(module: nn.Module, kind: Any) -> None:
    before = type(module).forward
    module.__class__ = kind
    # accelerate replaces forward by its own function, which calls the previous forward
    behind = vars(module).get("_old_forward")
    if getattr(behind, "__func__", None) is before:
        vars(module)["_old_forward"] = MethodType(kind.forward, module)
