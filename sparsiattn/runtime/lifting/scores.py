"""A deferred product of queries and keys, which stands in for a tensor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from sparsiattn.runtime.lifting.sums import put_off_sum
from sparsiattn.runtime.thread_state import SITE_CALLS

Terms = tuple[tuple[Tensor, tuple[int, ...]], ...]
"""Tensors that were added to the scores, each with the shape of the scores at that time."""


OPERATIONS: dict[str, Callable[..., Any]] = {}
"""Operations that can be recorded without computing the scores, by their name in torch."""


def operation(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator that registers how torch operations of these names act on scores.

    The function returns NotImplemented if the operation needs the values of the scores.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        OPERATIONS.update(dict.fromkeys(names, function))
        return function

    return register


class LiftMode(Protocol):
    """The mode that defers scores.

    Attributes:
        idle: Whether deferring is paused.
        puts_off_sums: Whether it defers bias sums too.
    """

    idle: bool
    puts_off_sums: bool

    def attend(self, *operands: Any, **options: Any) -> Tensor:
        """Scaled dot product attention; arguments as torch takes them."""

    def home(self) -> int:
        """Key of the module in which scores are made; they must meet their values there."""

    def refuse(self, scores: Scores, because: str) -> None:
        """Called when the operation named ``because`` needs the values of scores."""


FIELDS = (
    *("lift", "home", "q", "kt", "shape", "made_as", "dtype", "device", "factor", "terms"),
    *("softmaxed", "dropout", "flipped", "part_of", "returned", "view_of", "value"),
)
"""Names of the attributes of `Scores`."""


class Scores:
    """A deferred product ``q @ kt``, and the operations that were applied to it since.

    It stands in for the tensor ``[..., Nq, Nk]`` in the host's code.

    Args:
        lift: The mode that deferred the product.
        q: Queries, ``[..., Nq, D]``.
        kt: Keys, ``[..., D, Nk]``.
    """

    def __init__(self, lift: LiftMode, q: Tensor, kt: Tensor) -> None:
        self.lift, self.home, self.q, self.kt = lift, lift.home(), q, kt
        lead = torch.broadcast_shapes(q.shape[:-2], kt.shape[:-2])
        self.shape = self.made_as = torch.Size((*lead, q.shape[-2], kt.shape[-1]))
        self.dtype, self.device = q.dtype, q.device
        self.factor: float = 1.0
        self.terms: Terms = ()
        self.softmaxed, self.dropout, self.flipped = False, 0.0, False
        self.part_of: tuple[Scores, tuple[int, int]] | None = None
        self.returned = 0  # of a slice: number of terms that were added to the original already
        self.view_of: Scores | None = None
        self.value: Tensor | None = None

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.strip("_")
        result = _apply(name, args, kwargs or {})
        if result is not NotImplemented:
            return result
        args, kwargs = computed(name, args), computed(name, kwargs or {})
        return func(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.strip("_") in OPERATIONS:
            return partial(_method, name, self)
        return getattr(self.tensor(name), name)

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return len(self.shape)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def mT(self) -> Any:
        return self.transpose(-2, -1)

    def but(self, **fields: Any) -> Scores:
        """A copy with some attributes replaced."""
        other = Scores.__new__(Scores)
        for name in FIELDS:  # a list, as Dynamo of torch 2.10 does not trace ``vars(self)``
            setattr(other, name, fields[name] if name in fields else getattr(self, name))
        return other

    def tensor(self, because: str = "") -> Tensor:
        """The values of the scores (or weights), computed as the host would compute them."""
        if self.value is None:
            self.lift.refuse(self, because)
            self.lift.idle = True  # otherwise this product would be deferred again
            try:
                self.value = self._compute()
            finally:
                self.lift.idle = False
        return self.value

    def used(self) -> Tensor:
        """The weights that are in fact used: attention applied to the identity as values."""
        shape = flip(self.shape) if self.flipped else self.shape
        keys = torch.eye(shape[-1], dtype=self.dtype, device=self.device)
        weights = self.attend(keys.expand(*shape[:-2], *keys.shape))
        return weights.transpose(-2, -1) if self.flipped else weights

    def _compute(self) -> Tensor:
        x = (self.q @ self.kt) * self.factor
        x = x.reshape(self.shape if not self.flipped else flip(self.shape))
        bias = self.bias()
        if bias is not None:
            x = x + bias
        if self.softmaxed:
            x = F.dropout(x.softmax(-1), self.dropout)
        return x.transpose(-2, -1) if self.flipped else x

    def bias(self) -> Tensor | None:
        """Sum of the tensors added to the scores, broadcastable to their current shape."""
        shape = flip(self.shape) if self.flipped else self.shape
        sums: dict[tuple[int, ...], Tensor] = {}
        for term, size in self.terms:
            sums[size] = term if size not in sums else self._added(sums[size], term)
        bias = None
        for size, term in sums.items():
            fitted = term if size == shape else term.expand(size).reshape(shape)
            bias = fitted if bias is None else bias + fitted
        return bias

    def _added(self, a: Tensor, b: Tensor) -> Tensor:
        bias = put_off_sum((a, b)) if self.lift.puts_off_sums else None
        return a + b if bias is None else bias

    def add_part(self, bias: Tensor | None, starts: tuple[int, int]) -> None:
        """Add a bias to the scores ``[..., i:, j:]`` in place."""
        if bias is not None:
            i, j = starts
            part = bias.expand(*self.shape[:-2], self.shape[-2] - i, self.shape[-1] - j)
            self.terms = (*self.terms, (F.pad(part, (j, 0, i, 0)), self.shape))

    def attend(self, v: Tensor) -> Tensor:
        """Attention with these weights, ``[..., Nq, Dv]``, by scaled dot product attention."""
        shape = flip(self.shape) if self.flipped else self.shape
        q, k, mask = self.q, self.kt.transpose(-2, -1), self.bias()
        if shape != self.made_as:
            q, k = (x.reshape(*shape[:-2], *x.shape[-2:]) for x in (q, k))
        if mask is not None:
            mask = mask[(None,) * (len(shape) - mask.dim())].to(v.dtype)
        SITE_CALLS.deferred = True
        try:
            return self.lift.attend(
                q.to(v.dtype), k.to(v.dtype), v, mask, self.dropout, scale=self.factor
            )
        finally:
            SITE_CALLS.deferred = False


def flip(shape: tuple[int, ...]) -> torch.Size:
    """The shape with its last two sizes swapped."""
    return torch.Size((*shape[:-2], shape[-1], shape[-2]))


def computed(name: str, values: Any) -> Any:
    """Arguments with scores replaced by their values."""
    return tree_map(lambda x: x.tensor(name) if isinstance(x, Scores) else x, values)


def _method(name: str, scores: Scores, *args: Any, **kwargs: Any) -> Any:
    """Call a tensor method on scores."""
    result = _apply(name.strip("_"), (scores, *args), kwargs)
    if result is NotImplemented:
        args, kwargs = computed(name, args), computed(name, kwargs)
        result = getattr(scores.tensor(name), name)(*args, **kwargs)
    elif isinstance(result, Scores) and _in_place(name):
        return _replace(scores, result)
    return result


def _operator(name: str) -> Callable[..., Any]:
    return lambda scores, *args: _method(name, scores, *args)


def _in_place(name: str) -> bool:
    return name.startswith("__i") if name.startswith("__") else name.endswith("_")


def _replace(scores: Scores, result: Scores) -> Scores:
    """Apply an in-place operation to scores, and to the scores that they are a view or slice of."""
    if scores.part_of is not None:
        _put_back(scores, result)
    target: Scores | None = scores
    while target is not None:
        target.q, target.factor, target.terms = result.q, result.factor, result.terms
        target.returned = len(target.terms) if target.part_of is not None else 0
        target = target.view_of
    return scores


def _put_back(part: Scores, result: Scores) -> None:
    """Add to the original scores the bias that was added in place to a slice of them."""
    assert part.part_of is not None
    origin, starts = part.part_of
    # a bias on a slice can be added to the original; a factor on a slice cannot be applied to it
    if result.q is not part.q or result.factor != part.factor:
        raise NotImplementedError("a factor in place on a part of attention scores")
    shape = (*origin.shape[:-2], *(n - s for n, s in zip(origin.shape[-2:], starts, strict=True)))
    terms = result.terms[part.returned :]
    origin.add_part(result.but(terms=terms, view_of=None, shape=torch.Size(shape)).bias(), starts)


def _apply(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Result of an operation on scores; NotImplemented if it needs the values of the scores."""
    operation = OPERATIONS.get(name)
    first = next((x for x in args if isinstance(x, Scores)), None)
    if operation is None or (first is not None and first.value is not None):
        return NotImplemented
    return operation(*args, **kwargs)


_OPERATORS = (
    *("mul", "rmul", "imul", "truediv", "itruediv", "rtruediv", "add", "radd", "iadd", "sub"),
    *("rsub", "isub", "matmul", "rmatmul", "getitem", "setitem", "neg", "pow", "rpow", "abs"),
    *("lt", "le", "gt", "ge", "len", "iter", "bool", "float"),
)
for _name in _OPERATORS:
    # Python looks operators up on the class, so `__getattr__` does not see them
    setattr(Scores, f"__{_name}__", _operator(f"__{_name}__"))
