"""`FactoredBias`: an additive bias stored as one term per key row and one per key column.

Decomposed relative positions (MViTv2, arXiv 2112.01526, section 4.1; SAM's image encoder) give
every query such a bias. Materialised, it is as large as the logits of the site, and writing and
reading it takes as long as attention.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from sparsiattn.errors import ModelChanged

LEAST = 1 << 14
"""Smaller sums are computed at once; deferring them does not pay."""

_ATEN = torch.ops.aten
_VIEWS = (_ATEN.view, _ATEN.reshape, _ATEN._unsafe_view, _ATEN._reshape_alias)
_SAME = (_ATEN.detach, _ATEN.alias, _ATEN.lift_fresh)
_MAYBE_SAME = (_ATEN.to, _ATEN.contiguous)
_ALONG = (_ATEN.select, _ATEN.slice, _ATEN.index_select, _ATEN.narrow, _ATEN.squeeze)


@dataclass(eq=False)
class _Origin:
    """State shared by all views of one sum.

    Attributes:
        value: The materialised sum, once something was written to it; None before.
        apart: Whether slices of the sum were taken, or this is a slice. Slices do not see writes.
    """

    value: Tensor | None = None
    apart: bool = False


class FactoredBias(Tensor):
    """A tensor ``[..., kh * kw]`` whose entries are ``rows[..., y] + columns[..., x]``.

    The host model uses it like any tensor. Operations that keep the last dimension intact are
    applied to both factors; any other operation materialises the sum and returns a plain tensor.

    Args:
        rows: Term of each key row, ``[..., kh]``.
        columns: Term of each key column, ``[..., kw]``.
        merged: Whether keys are one dimension, ``[..., kh * kw]``, or two, ``[..., kh, kw]``, as
            in the sum that hosts write.

    >>> rows, columns = torch.rand(2, 5, 3), torch.rand(2, 5, 4)
    >>> bias = FactoredBias(rows, columns)
    >>> bias.shape, bias[:, 1:3].shape, type(bias[:, 1:3]).__name__
    (torch.Size([2, 5, 12]), torch.Size([2, 2, 12]), 'FactoredBias')
    >>> torch.equal(bias * 2, (rows[..., None] + columns[..., None, :]).flatten(-2) * 2)
    True
    """

    # torch functions run as on any tensor; their operators reach __torch_dispatch__ below
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    rows: Tensor
    columns: Tensor
    merged: bool
    origin: _Origin

    @staticmethod
    def __new__(
        cls, rows: Tensor, columns: Tensor, merged: bool = True, origin: _Origin | None = None
    ) -> FactoredBias:
        sides = (rows.shape[-1], columns.shape[-1])
        shape = (*rows.shape[:-1], math.prod(sides)) if merged else (*rows.shape[:-1], *sides)
        self: FactoredBias = Tensor._make_wrapper_subclass(
            cls, shape, dtype=rows.dtype, device=rows.device
        )
        self.rows, self.columns, self.merged = rows, columns, merged
        self.origin = origin or _Origin()
        return self

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"FactoredBias({tuple(self.shape)}, sides={self.sides})"

    @property
    def sides(self) -> tuple[int, int]:
        """Number of key rows and key columns."""
        return self.rows.shape[-1], self.columns.shape[-1]

    def factors(self) -> Tensor:
        """Both factors in one tensor, rows first, ``[..., kh + kw]``."""
        return torch.cat([self.rows, self.columns], dim=-1)

    def built(self) -> Tensor:
        """The bias as a plain tensor."""
        if self.origin.value is not None:
            return self.origin.value.view(self.shape)
        return (self.rows.unsqueeze(-1) + self.columns.unsqueeze(-2)).reshape(self.shape)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        bias = args[0] if args else None
        if isinstance(bias, FactoredBias) and bias.origin.value is None:
            on_factors = OPERATIONS.get(func.overloadpacket)
            result = None if on_factors is None else on_factors(func, bias, *args[1:], **kwargs)
            if result is not None:
                return result
        if func._schema.is_mutable:
            return _written(func, args, kwargs)
        return func(*tree_map(plain, args), **tree_map(plain, kwargs))


def plain(x: Any) -> Any:
    """A `FactoredBias` as a plain tensor; anything else unchanged."""
    return x.built() if isinstance(x, FactoredBias) else x


def are_factors(a: Tensor, b: Tensor) -> bool:
    """Whether these are ``[..., kh, 1]`` and ``[..., 1, kw]`` in either order, and large enough."""
    if a.dim() != b.dim() or a.dim() < 4 or a.shape[:-2] != b.shape[:-2] or a.dtype != b.dtype:
        return False
    rows, columns = (a, b) if a.shape[-1] == 1 else (b, a)
    if rows.shape[-1] != 1 or columns.shape[-2] != 1 or 1 in (rows.shape[-2], columns.shape[-1]):
        return False
    return rows.numel() * columns.shape[-1] >= LEAST


def sum_of(a: Tensor, b: Tensor) -> FactoredBias:
    """The deferred sum of two tensors for which `are_factors` holds."""
    rows, columns = (a, b) if a.shape[-1] == 1 else (b, a)
    return FactoredBias(rows.squeeze(-1), columns.squeeze(-2), merged=False)


def _written(func: Any, args: Any, kwargs: Any) -> Any:
    """Run an operator that writes in place, so that other views of its target see the write."""
    named = dict(zip((x.name for x in func._schema.arguments), args, strict=False)) | kwargs
    targets = [
        named[x.name]
        for x in func._schema.arguments
        if x.alias_info is not None
        and x.alias_info.is_write
        and isinstance(named.get(x.name), FactoredBias)
    ]
    for target in targets:
        if target.origin.apart:
            raise ModelChanged(
                "the model writes to a slice of its relative position bias, which a patched module "
                "does not build: write to the whole bias, or exclude the module with sites="
            )
        target.origin.value = target.built()
    out = func(*tree_map(plain, args), **tree_map(plain, kwargs))
    return targets[0] if targets else out


Operation = Callable[..., Tensor | None]

OPERATIONS: dict[Any, Operation] = {}
"""Operations on factors, by torch operator; they return None where the sum has to be built."""


def _operation(*operators: Any) -> Callable[[Operation], Operation]:
    def register(function: Operation) -> Operation:
        OPERATIONS.update(dict.fromkeys(operators, function))
        return function

    return register


@_operation(*_VIEWS)
def _view(_: Any, bias: FactoredBias, size: Sequence[int], *__: Any) -> FactoredBias | None:
    known = math.prod(n for n in size if n != -1)
    shape = [bias.numel() // max(known, 1) if n == -1 else n for n in size]
    keys = math.prod(bias.sides)
    merged = bool(shape) and shape[-1] == keys
    if not merged and tuple(shape[-2:]) != bias.sides:
        return None
    lead = shape[:-1] if merged else shape[:-2]
    if math.prod(lead) * keys != bias.numel():
        return None  # torch raises the error
    rows, columns = (x.reshape(*lead, x.shape[-1]) for x in (bias.rows, bias.columns))
    return FactoredBias(rows, columns, merged, bias.origin)


@_operation(*_SAME)
def _same(_: Any, bias: FactoredBias) -> FactoredBias:
    return FactoredBias(bias.rows, bias.columns, bias.merged, bias.origin)


@_operation(*_MAYBE_SAME)
def _unless_other(func: Any, bias: FactoredBias, *args: Any, **kwargs: Any) -> Tensor | None:
    """A conversion of dtype, device or memory layout, if it is a no-op."""
    probe = bias.rows.new_empty(0)
    return bias if func(probe, *args, **kwargs) is probe else None


@_operation(_ATEN.expand)
def _expand(_: Any, bias: FactoredBias, size: Sequence[int], **__: Any) -> Tensor | None:
    if tuple(size) == bias.shape:
        return FactoredBias(bias.rows, bias.columns, bias.merged, bias.origin)
    if not bias.merged or size[-1] not in (-1, bias.shape[-1]):
        return None
    rows, columns = (x.expand(*size[:-1], x.shape[-1]) for x in (bias.rows, bias.columns))
    same_size = rows.shape[:-1].numel() == bias.rows.shape[:-1].numel()
    return FactoredBias(rows, columns, True, bias.origin if same_size else _apart(bias))


@_operation(_ATEN.unsqueeze)
def _unsqueeze(_: Any, bias: FactoredBias, dim: int) -> FactoredBias | None:
    if not bias.merged or not 0 <= dim < bias.dim():
        return None
    return FactoredBias(bias.rows.unsqueeze(dim), bias.columns.unsqueeze(dim), True, bias.origin)


@_operation(*_ALONG)
def _along(func: Any, bias: FactoredBias, dim: Any = None, *args: Any) -> FactoredBias | None:
    """A slice along tokens, heads or images, with all keys."""
    dim = 0 if dim is None and func.overloadpacket is _ATEN.slice else dim
    if not bias.merged or not isinstance(dim, int) or dim % bias.dim() == bias.dim() - 1:
        return None
    rows, columns = (func(x, dim % bias.dim(), *args) for x in (bias.rows, bias.columns))
    return FactoredBias(rows, columns, True, _apart(bias))


def _apart(bias: FactoredBias) -> _Origin:
    bias.origin.apart = True
    return _Origin(apart=True)


@_operation(_ATEN.gather)
def _gather(_: Any, bias: FactoredBias, dim: int, index: Tensor, **__: Any) -> Tensor | None:
    """Entries of some keys of each row, as a plain tensor."""
    if not bias.merged or dim % bias.dim() != bias.dim() - 1 or isinstance(index, FactoredBias):
        return None
    across = bias.sides[1]
    return bias.rows.gather(-1, index // across) + bias.columns.gather(-1, index % across)
