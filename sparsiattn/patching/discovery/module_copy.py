"""Deep copies of modules, much faster than `copy.deepcopy` for modules without special behaviour.

Most models consist of hundreds of modules with dozens of plain attributes each.
"""

from __future__ import annotations

import copy
import copyreg
import types
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import nn

ATOMS: frozenset[type] = frozenset(
    {type(None), bool, int, float, complex, str, bytes, type, types.FunctionType}
    | {types.BuiltinFunctionType, torch.dtype}
)
"""Types whose values are copies of themselves."""
_COMPILED = "_compiled_call_impl"
"""The attribute that `nn.Module` excludes from its state."""


def copy_modules(model: nn.Module, modules: Sequence[nn.Module], memo: dict[int, Any]) -> Any:
    """A copy equal to ``copy.deepcopy(model, memo)``.

    Args:
        model: The model.
        modules: All of its modules, including itself.
        memo: Existing copies, by the id of the original; new ones are added.
    """
    special = [module for module in modules if not _is_plain(module)]
    # a special module may use its submodules while it is copied, so these must be complete by then
    inside = {id(part) for module in special for part in module.modules()}
    plain = [m for m in modules if id(m) not in memo and id(m) not in inside]
    for module in plain:
        memo[id(module)] = type(module).__new__(type(module))
    for module in plain:
        copied = vars(memo[id(module)])
        for name, value in vars(module).items():
            if name != _COMPILED:
                copied[name] = value if type(value) in ATOMS else _copied(value, memo)
    return copy.deepcopy(model, memo)


def _is_plain(module: nn.Module) -> bool:
    return "__deepcopy__" not in vars(module) and _copies_plainly(type(module))  # type: ignore[arg-type]


@cache
def _copies_plainly(kind: Any) -> bool:
    """Whether `copy.deepcopy` copies modules of this class attribute by attribute."""
    special = ("__deepcopy__", "__getnewargs__", "__getnewargs_ex__")
    inherited = (
        kind.__reduce_ex__ is object.__reduce_ex__
        and kind.__reduce__ is object.__reduce__
        and kind.__setstate__ is nn.Module.__setstate__
        and getattr(kind, "__getstate__", None) is getattr(nn.Module, "__getstate__", None)
    )
    slots: Any = copyreg._slotnames(kind)  # type: ignore[attr-defined]
    registered = kind in copyreg.dispatch_table
    return inherited and not (slots or registered or any(hasattr(kind, name) for name in special))


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    kind = type(value)
    if kind in ATOMS:
        return value
    known = memo.get(id(value), memo)  # `memo` as the default, since a copy may be None
    if known is not memo:
        return known
    if kind is dict:
        copied: dict[Any, Any] = {}
        memo[id(value)] = copied
        for key, item in value.items():
            own = key if type(key) in ATOMS else _copied(key, memo)
            copied[own] = _copied(item, memo)
        return copied
    if kind is set and not value:
        memo[id(value)] = set()
        return memo[id(value)]
    return copy.deepcopy(value, memo)
