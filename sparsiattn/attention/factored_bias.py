"""A bias that is a sum of a number for the key's row and one for its column, kept as these two.

Decomposed relative positions (MViTv2, arXiv 2112.01526, section 4.1; SAM's image encoder) give
every query such a bias. Built, it is as large as all logits of the site, and takes as long to write
and to read as attention does.
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
"""A sum of fewer numbers is not worth putting off."""

_ATEN = torch.ops.aten
_VIEWS = (_ATEN.view, _ATEN.reshape, _ATEN._unsafe_view, _ATEN._reshape_alias)
_SAME = (_ATEN.detach, _ATEN.alias, _ATEN.lift_fresh)
_MAYBE_SAME = (_ATEN.to, _ATEN.contiguous)
_ALONG = (_ATEN.select, _ATEN.slice, _ATEN.index_select, _ATEN.narrow, _ATEN.squeeze)


@dataclass(eq=False)
class _Origin:
    """What views of one sum share.

    Attributes:
        value: The sum, once something was written to it.
        apart: Whether parts of it were taken, or whether it is one: they would not see writing.
    """

    value: Tensor | None = None
    apart: bool = False


class FactoredBias(Tensor):
    """A tensor ``[..., kh * kw]`` whose entries are ``rows[..., y] + columns[..., x]``.

    Hosts hold it without knowing. What leaves the last dimension whole is done to both factors;
    for anything else the sum is computed, and the result is a plain tensor.

    Args:
        rows: ``[..., kh]``.
        columns: ``[..., kw]``.
        merged: Whether keys are one dimension; else they are two, ``[..., kh, kw]``, as hosts add
            them up.

    >>> rows, columns = torch.rand(2, 5, 3), torch.rand(2, 5, 4)
    >>> bias = FactoredBias(rows, columns)
    >>> bias.shape, bias[:, 1:3].shape, type(bias[:, 1:3]).__name__
    (torch.Size([2, 5, 12]), torch.Size([2, 2, 12]), 'FactoredBias')
    >>> torch.equal(bias * 2, (rows[..., None] + columns[..., None, :]).flatten(-2) * 2)
    True
    """

    # functions run as on any tensor, and the operators that they are made of come to the class
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
        """Rows and columns of the keys."""
        return self.rows.shape[-1], self.columns.shape[-1]

    def factors(self) -> Tensor:
        """Rows, then columns, ``[..., kh + kw]``."""
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
            lazy = OPERATIONS.get(func.overloadpacket)
            result = None if lazy is None else lazy(func, bias, *args[1:], **kwargs)
            if result is not None:
                return result
        if func._schema.is_mutable:
            return _written(func, args, kwargs)
        return func(*tree_map(plain, args), **tree_map(plain, kwargs))


def plain(x: Any) -> Any:
    """A bias as a plain tensor; anything else as it is."""
    return x.built() if isinstance(x, FactoredBias) else x


def are_factors(a: Tensor, b: Tensor) -> bool:
    """Whether these are ``[..., kh, 1]`` and ``[..., 1, kw]``, in either order, of many queries."""
    if a.dim() != b.dim() or a.dim() < 4 or a.shape[:-2] != b.shape[:-2] or a.dtype != b.dtype:
        return False
    rows, columns = (a, b) if a.shape[-1] == 1 else (b, a)
    if rows.shape[-1] != 1 or columns.shape[-2] != 1 or 1 in (rows.shape[-2], columns.shape[-1]):
        return False
    return rows.numel() * columns.shape[-1] >= LEAST


def sum_of(a: Tensor, b: Tensor) -> FactoredBias:
    """The sum of two tensors that are factors, put off."""
    rows, columns = (a, b) if a.shape[-1] == 1 else (b, a)
    return FactoredBias(rows.squeeze(-1), columns.squeeze(-2), merged=False)


def _written(func: Any, args: Any, kwargs: Any) -> Any:
    """An operator that writes: whoever holds another view of what it writes to sees it."""
    given = dict(zip((x.name for x in func._schema.arguments), args, strict=False)) | kwargs
    targets = [
        given[x.name]
        for x in func._schema.arguments
        if x.alias_info is not None
        and x.alias_info.is_write
        and isinstance(given.get(x.name), FactoredBias)
    ]
    for target in targets:
        if target.origin.apart:
            raise ModelChanged(
                "a model writes to a part of its relative position bias, which a patched module "
                "does not build: add to the whole of it, or leave the module out with sites="
            )
        target.origin.value = target.built()
    out = func(*tree_map(plain, args), **tree_map(plain, kwargs))
    return targets[0] if targets else out


Operation = Callable[..., Tensor | None]

OPERATIONS: dict[Any, Operation] = {}
"""What can be done to factors, by torch's operator; None where it cannot in this case."""


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
        return None  # torch says what is wrong
    rows, columns = (x.reshape(*lead, x.shape[-1]) for x in (bias.rows, bias.columns))
    return FactoredBias(rows, columns, merged, bias.origin)


@_operation(*_SAME)
def _same(_: Any, bias: FactoredBias) -> FactoredBias:
    return FactoredBias(bias.rows, bias.columns, bias.merged, bias.origin)


@_operation(*_MAYBE_SAME)
def _unless_other(func: Any, bias: FactoredBias, *args: Any, **kwargs: Any) -> Tensor | None:
    """A change of type, device or memory layout that changes nothing."""
    probe = bias.rows.new_empty(0)
    return bias if func(probe, *args, **kwargs) is probe else None


@_operation(_ATEN.expand)
def _expand(_: Any, bias: FactoredBias, size: Sequence[int], **__: Any) -> Tensor | None:
    if tuple(size) == bias.shape:
        return FactoredBias(bias.rows, bias.columns, bias.merged, bias.origin)
    if not bias.merged or size[-1] not in (-1, bias.shape[-1]):
        return None
    rows, columns = (x.expand(*size[:-1], x.shape[-1]) for x in (bias.rows, bias.columns))
    whole = rows.shape[:-1].numel() == bias.rows.shape[:-1].numel()
    return FactoredBias(rows, columns, True, bias.origin if whole else _apart(bias))


@_operation(_ATEN.unsqueeze)
def _unsqueeze(_: Any, bias: FactoredBias, dim: int) -> FactoredBias | None:
    if not bias.merged or not 0 <= dim < bias.dim():
        return None
    return FactoredBias(bias.rows.unsqueeze(dim), bias.columns.unsqueeze(dim), True, bias.origin)


@_operation(*_ALONG)
def _along(func: Any, bias: FactoredBias, dim: Any = None, *args: Any) -> FactoredBias | None:
    """Tokens, heads or images of all keys."""
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
    """Entries for some keys of each row: a plain tensor."""
    if not bias.merged or dim % bias.dim() != bias.dim() - 1 or isinstance(index, FactoredBias):
        return None
    across = bias.sides[1]
    return bias.rows.gather(-1, index // across) + bias.columns.gather(-1, index % across)
