"""Operators on tensors without data, worked out once for each set of shapes.

On the meta device torch infers shapes in Python, most of a millisecond for each operator, and the
blocks of a transformer ask the same again and again: a dry run would take longer than a real one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode
from torch.utils._pytree import tree_leaves

_MOST = 20_000
"""Answers that are kept; a model asks for some hundreds."""

_KNOWN: dict[Any, Any] = {}
_SCALARS = (bool, int, float, str, torch.dtype, torch.device, torch.layout, torch.memory_format)


class _NotRecalled(Exception):
    """The result of this call may depend on more than can be noted."""


def taken_apart(mode: TorchDispatchMode, func: Any, args: Any, kwargs: Any) -> Any:
    """An operator's result by the operators it is made of, each shown to the mode.

    Returns:
        NotImplemented where there are none, or where it was taken apart before; inference mode
        alone shows operators as they were called.
    """
    if not torch.is_inference_mode_enabled():
        return NotImplemented
    with mode:
        return func.decompose(*args, **kwargs)


@contextmanager
def recalling() -> Iterator[None]:
    """Operators on the meta device are quick inside.

    Modes that count or trace belong inside, too: they see every call as they would without. Where
    there is one outside, nothing is recalled.
    """
    if _get_current_dispatch_mode() is not None:
        yield
        return
    with Recalled():  # type: ignore[no-untyped-call]
        yield


class Recalled(TorchDispatchMode):
    """Answers calls that were made before from the shapes of their arguments.

    All tensors must be on the meta device, and the operator must make new ones.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.answer(func, args, kwargs or {})

    def answer(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The operator's result, from memory where it can be."""
        if not _makes_new(func):
            return func(*args, **kwargs)
        tensors: list[Tensor] = []
        try:
            key = (func, torch.get_default_dtype(), _key(args, tensors), _key(kwargs, tensors))
        except _NotRecalled:
            return func(*args, **kwargs)
        known = _KNOWN.get(key) if tensors else None
        if known is not None:
            return _empty(known)
        out = func(*args, **kwargs)
        if tensors and _is_new(out, tensors):
            if len(_KNOWN) >= _MOST:
                _KNOWN.clear()
            _KNOWN[key] = _described(out)
        elif tensors:  # what it says of itself was not all
            _NEW[func] = False
        return out


_NEW: dict[Any, bool] = {}


def _makes_new(func: Any) -> bool:
    """Whether an operator of torch's own writes to none of its arguments and returns no view."""
    makes_new = _NEW.get(func)
    if makes_new is None:
        values = (*func._schema.arguments, *func._schema.returns)
        makes_new = func.namespace == "aten" and all(v.alias_info is None for v in values)
        _NEW[func] = makes_new
    return makes_new


def _key(value: Any, tensors: list[Tensor]) -> Any:
    """What an operator may read of an argument; tensors in it are appended to ``tensors``."""
    if value is None or isinstance(value, _SCALARS):
        return type(value), value  # 1, 1.0 and True are equal, and promote to other types
    if isinstance(value, (list, tuple)):
        return tuple(_key(item, tensors) for item in value)
    if isinstance(value, dict):
        return tuple((name, _key(item, tensors)) for name, item in value.items())
    if type(value) not in (Tensor, nn.Parameter) or not value.is_meta:
        raise _NotRecalled
    if value.layout != torch.strided or value.is_conj() or value.is_neg():
        raise _NotRecalled
    tensors.append(value)
    return value.dtype, value.shape, value.stride()


def _is_new(out: Any, arguments: list[Tensor]) -> bool:
    """Whether a result is plain tensors without data, none in the memory of an argument."""
    taken = {tensor.untyped_storage()._cdata for tensor in arguments}
    return all(
        leaf is None
        or (
            type(leaf) is Tensor
            and leaf.is_meta
            and leaf.layout == torch.strided
            and leaf.storage_offset() == 0
            and leaf.untyped_storage()._cdata not in taken
        )
        for leaf in tree_leaves(out)
    )


def _described(out: Any) -> Any:
    if isinstance(out, (list, tuple)):
        return [_described(item) for item in out]
    return None if out is None else (tuple(out.shape), out.stride(), out.dtype)


def _empty(known: Any) -> Any:
    """A new result like the one described."""
    if isinstance(known, list):
        return tuple(None if item is None else _empty(item) for item in known)
    shape, strides, dtype = known
    return torch.empty_strided(shape, strides, dtype=dtype, device="meta")
