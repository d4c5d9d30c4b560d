"""Caches the results of operators on meta tensors by their arguments' shapes.

On the meta device torch infers shapes in Python, which takes almost a millisecond per operator, and
the blocks of a transformer repeat the same operators: without a cache a dry run would take longer
than a real one.
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
"""Size limit of the cache; a model needs a few hundred entries."""

_KNOWN: dict[Any, Any] = {}
_SCALARS = (bool, int, float, str, torch.dtype, torch.device, torch.layout, torch.memory_format)


class _NotRecalled(Exception):
    """The result of this call may depend on more than a cache key can hold."""


def taken_apart(mode: TorchDispatchMode, func: Any, args: Any, kwargs: Any) -> Any:
    """Run an operator as the simpler operators that it decomposes into, so that the mode sees them.

    Linear layers and attention stay whole: modes know them as they are, and their parts are two
    thirds of the operators of a transformer's block.

    Returns:
        The result. NotImplemented if the operator does not decompose or stays whole, or outside of
        inference mode, where torch has decomposed it already.
    """
    if not torch.is_inference_mode_enabled() or _stays_whole(func, args, kwargs):
        return NotImplemented
    with mode:
        return func.decompose(*args, **kwargs)


def _stays_whole(func: Any, args: Any, kwargs: Any) -> bool:
    packet = func.overloadpacket
    if packet is torch.ops.aten.scaled_dot_product_attention:
        # with values torch has fused operators for it, with grouped heads it repeats the keys
        return bool(args[0].is_meta) and not kwargs.get("enable_gqa")
    return packet is torch.ops.aten.linear


@contextmanager
def recalling() -> Iterator[None]:
    """Context manager that speeds up operators on the meta device by the cache.

    Modes that count or trace must be entered inside of it; they then see every call as usual. If a
    mode is active outside, the cache is not used.
    """
    if _get_current_dispatch_mode() is not None:
        yield
        return
    with Recalled():  # type: ignore[no-untyped-call]
        yield


class Recalled(TorchDispatchMode):
    """Dispatch mode that returns cached results for calls with the same argument shapes.

    All tensors must be on the meta device, and the operator must return new tensors.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.answer(func, args, kwargs or {})

    def answer(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The operator's result, from the cache if possible."""
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
        elif tensors:  # its schema was not accurate
            _NEW[func] = False
        return out


_NEW: dict[Any, bool] = {}


def _makes_new(func: Any) -> bool:
    """Whether an operator is torch's own, writes to none of its arguments and returns no view."""
    makes_new = _NEW.get(func)
    if makes_new is None:
        values = (*func._schema.arguments, *func._schema.returns)
        makes_new = func.namespace == "aten" and all(v.alias_info is None for v in values)
        _NEW[func] = makes_new
    return makes_new


def _key(value: Any, tensors: list[Tensor]) -> Any:
    """The cache key of an argument; tensors in it are appended to ``tensors``."""
    if value is None or isinstance(value, _SCALARS):
        return type(value), value  # 1, 1.0 and True are equal but promote differently
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
    """Whether a result consists of plain meta tensors that share no memory with an argument."""
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
    """A new result of the described shape, strides and dtype."""
    if isinstance(known, list):
        return tuple(None if item is None else _empty(item) for item in known)
    shape, strides, dtype = known
    return torch.empty_strided(shape, strides, dtype=dtype, device="meta")
