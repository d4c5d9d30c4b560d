"""Another class for one module: unlike a replaced ``forward`` it survives deepcopy and pickle."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from types import MethodType
from typing import Any

from torch import nn

HOST = "_sparsiattn_host"
"""Where a swapped class names the host's class."""


class Swapped:
    """Mixin of the swapped classes: pickles and copies as (its host's class, its state)."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(protocol)
        swapped = HOST in vars(type(self))
        return (*creation(type(self)), *reduced[2:]) if swapped else reduced

    @staticmethod
    def members(host: Any) -> Mapping[str, Any]:
        """What the swapped class adds to the host's."""
        raise NotImplementedError


class Hooked(Swapped):
    """Mixin of the class of a module with hooks of a patch, which says the same as the host's.

    Dynamo guards the types of modules and not their hooks: a copy that is not patched, compiled in
    the same process, would lend its program to the patched model.
    """

    @staticmethod
    def members(host: Any) -> Mapping[str, Any]:
        return {}


def mark_hooked(module: nn.Module) -> None:
    """Tell a module from unpatched ones of its class, unless its class does so already."""
    if not isinstance(module, Swapped):
        swap_class(module, Hooked)


def creation(kind: Any) -> tuple[Any, tuple[Any, ...]]:
    """What makes an empty object of a class, swapped or not: a function and its arguments."""
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
    """Give a module its own class back.

    Where something derived another class from ours meanwhile (parametrizations do), that one
    stays and does what the host's would.
    """
    if mixin in type(module).__bases__:
        _set_class(module, vars(type(module))[HOST])


def _set_class(module: nn.Module, kind: Any) -> None:
    before = type(module).forward
    module.__class__ = kind
    # accelerate puts a function of its own in front, and calls what was the forward before
    behind = vars(module).get("_old_forward")
    if getattr(behind, "__func__", None) is before:
        vars(module)["_old_forward"] = MethodType(kind.forward, module)
