"""Distinguishes forward hooks that a model needs for its outputs from hooks of the user.

Some libraries record hidden states by hooks, and a meta copy needs these. A hook by which a user
records something must not get meta tensors.
"""

from __future__ import annotations

import copy
import types
from collections.abc import Collection, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

_KINDS = {
    "_forward_pre_hooks": ("_forward_pre_hooks_with_kwargs",),
    "_forward_hooks": ("_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
}
"""Dictionaries of hooks, and those that hold the options of each."""
_NO_HOSTS = ("torch", "accelerate", "sparsiattn", "__main__", "builtins")
"""Packages whose hooks change a model, or cannot be distinguished from a user's code."""
_PLAIN = (
    *(type(None), bool, int, float, complex, str, bytes, tuple, type, types.ModuleType),
    *(types.FunctionType, types.BuiltinFunctionType, torch.dtype, torch.device),
)
"""Types of globals that cannot store arguments of a call."""

Memo = dict[int, Any]
"""The copies that `copy.deepcopy` has made so far, by the id of the original."""


def copy_host_hooks(modules: Sequence[nn.Module], memo: Memo) -> None:
    """Register the host's own forward hooks on the copy of a model, bound to the copy.

    A hook is the host's own if the libraries of the host's classes define it, or if it holds a part
    of the model. Other objects that it holds are copied, too, so that meta tensors do not reach the
    originals.

    Args:
        modules: The original model's modules.
        memo: The memo of its copy.
    """
    hooked = [m for m in modules if m._forward_hooks or m._forward_pre_hooks]
    packages = _host_packages(modules) if hooked else set()
    for module in hooked:
        copied = memo.get(id(module))
        for kind, options in _KINDS.items() if copied is not None else ():
            for key, hook in vars(module)[kind].items():
                if not _is_hosts(hook, memo, packages):
                    continue
                bound = _bound(hook, memo)
                if bound is None:
                    continue
                vars(copied)[kind][key] = bound
                for option in options:
                    if key in vars(module)[option]:
                        vars(copied)[option][key] = True


def _host_packages(modules: Sequence[nn.Module]) -> set[str]:
    """The libraries that define the model's classes and their base classes."""
    kinds = {kind for module in modules for kind in type(module).__mro__}
    return {_package(kind) for kind in kinds}.difference(_NO_HOSTS)


def _package(value: Any) -> str:
    return str(getattr(value, "__module__", "")).partition(".")[0]


def _is_hosts(hook: Any, memo: Memo, packages: Collection[str]) -> bool:
    functions = list(_functions(hook))
    if any(_package(function) == "sparsiattn" for function in (*functions, type(hook))):
        return False
    if functions and all(_is_installed(f) and _package(f) in packages for f in functions):
        return True
    holds = any(_is_part(value, memo) for value in _held(hook))
    return holds and not any(_keeps_state(function, packages) for function in functions)


def _is_part(value: Any, memo: Memo) -> bool:
    """Whether a value is a part of the model and was copied with it."""
    return id(value) in memo and memo[id(value)] is not value


def _held(hook: Any) -> Iterator[Any]:
    """Objects that a hook holds: the object of a method, bound arguments, its closure."""
    if isinstance(hook, types.MethodType):
        yield hook.__self__
        yield from _held(hook.__func__)
    elif isinstance(hook, partial):
        yield from (*hook.args, *hook.keywords.values())
        yield from _held(hook.func)
    elif isinstance(hook, types.FunctionType):
        yield from (*(hook.__defaults__ or ()), *(hook.__kwdefaults__ or {}).values())
        yield from (cell.cell_contents for cell in _filled(hook))
    else:
        yield from (hook, *getattr(hook, "__dict__", {}).values())


def _filled(function: types.FunctionType) -> list[types.CellType]:
    return [cell for cell in function.__closure__ or () if cell != types.CellType()]


def _functions(hook: Any) -> Iterator[types.FunctionType]:
    """The functions that a hook holds and that run when it is called."""
    if isinstance(hook, types.FunctionType):
        yield hook
        for cell in _filled(hook):
            inner = cell.cell_contents
            if isinstance(inner, types.FunctionType) and inner is not hook:
                yield inner
    elif isinstance(hook, types.MethodType):
        yield from _functions(hook.__func__)
    elif isinstance(hook, partial):
        yield from _functions(hook.func)
    else:
        yield from _functions(getattr(type(hook), "__call__", None))  # noqa: B004


def _is_installed(function: types.FunctionType) -> bool:
    return "-packages" in function.__code__.co_filename  # site-packages, dist-packages


def _keeps_state(function: types.FunctionType, packages: Collection[str]) -> bool:
    """Whether a function uses a global in which it could store its arguments."""
    space = function.__globals__
    values = [space[name] for name in _names(function.__code__) if name in space]
    return any(
        not isinstance(value, _PLAIN) and _package(type(value)) not in packages for value in values
    )


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _bound(hook: Any, memo: Memo) -> Any:
    """The same hook with copies of the objects that it holds; None if they cannot be copied."""
    try:
        return _copied(hook, memo)
    except Exception:  # a user's object may raise anything when it is copied
        return None


def _copied(value: Any, memo: Memo) -> Any:
    if isinstance(value, types.MethodType):
        function = _copied(value.__func__, memo)
        return types.MethodType(function, copy.deepcopy(value.__self__, memo))
    if isinstance(value, types.BuiltinMethodType):
        home = value.__self__  # for example the list of `list.append`
        is_method = home is not None and not isinstance(home, types.ModuleType)
        return getattr(copy.deepcopy(home, memo), value.__name__) if is_method else value
    if isinstance(value, partial):
        return partial(
            _copied(value.func, memo),
            *_each_copied(value.args, memo),
            **{name: _copied(argument, memo) for name, argument in value.keywords.items()},
        )
    if isinstance(value, types.FunctionType):
        return memo[id(value)] if id(value) in memo else _copied_function(value, memo)
    return copy.deepcopy(value, memo)


def _each_copied(values: tuple[Any, ...] | None, memo: Memo) -> tuple[Any, ...]:
    return tuple(_copied(value, memo) for value in values or ())


def _copied_function(function: types.FunctionType, memo: Memo) -> types.FunctionType:
    cells = tuple(types.CellType() for _ in function.__closure__ or ())
    copied = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, closure=cells
    )
    memo[id(function)] = copied  # first, since a function may hold itself
    copied.__defaults__ = _each_copied(function.__defaults__, memo)
    defaults = (function.__kwdefaults__ or {}).items()
    copied.__kwdefaults__ = {name: _copied(value, memo) for name, value in defaults}
    for cell, original in zip(cells, function.__closure__ or (), strict=True):
        if original != types.CellType():
            cell.cell_contents = _copied(original.cell_contents, memo)
    return copied
