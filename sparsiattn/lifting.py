"""Hand-written attention, ``softmax(q @ k.mT * s + b) @ v``, led to scaled dot product attention.

No forward is copied. While a lifted module runs, the product of its queries and keys is put off:
the host gets `Scores`, which take down what it does to them (factors, biases, masks, views,
softmax, dropout). Once they meet the values, scaled dot product attention is called with what was
taken down. If the host does anything else to them they are computed after all, and it goes on as
if nothing had happened.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

# Fills this low leave nothing of a key, whatever its score was.
FORBIDS = -1e4

Terms = tuple[tuple[Tensor, tuple[int, ...]], ...]
"""What was added to the scores, with the shape they had at that time."""


class Tally:
    """How many products became a call of scaled dot product attention."""

    def __init__(self) -> None:
        self.attended = 0


class Lift(TorchFunctionMode):
    """While active, products of two computed operands are put off."""

    def __init__(self, tally: Tally) -> None:
        super().__init__()
        self.idle = False
        self.tally = tally  # Dynamo loses sight of a mode's own attributes once it is left

    def attend(self, *operands: Any, **options: Any) -> Tensor:
        self.tally.attended += 1
        return F.scaled_dot_product_attention(*operands, **options)

    def home(self) -> int:
        """Tells where scores are made: they must meet their values in the same module."""
        return 0

    def refuse(self, scores: Scores, because: str) -> None:
        """Told when scores have to be computed, by the name of the operation that needs them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.strip("_")
        if name in PRODUCTS and not kwargs and not self.idle:
            operands = factors(name, args)
            if operands is not None:
                return Scores(self, *operands)
        return func(*args, **(kwargs or {}))


PRODUCTS = ("matmul", "bmm", "einsum")


def factors(name: str, args: Sequence[Any]) -> tuple[Tensor, Tensor] | None:
    """``[..., Nq, D]`` and ``[..., D, Nk]`` if these arguments ask for a product of two computed
    tensors of at least three dimensions; parameters are weights, not keys."""
    if name == "einsum":
        found = _einsum(args)
        if found is None or not _is_product(found[0]):
            return None
        left, right = found[1], found[2]
    else:
        left, right = args
    for x in (left, right):
        if not isinstance(x, Tensor) or isinstance(x, nn.Parameter) or x.dim() < 3:
            return None
    if left.dim() != right.dim():
        return None
    return left, right.transpose(-2, -1) if name == "einsum" else right


def _einsum(args: Sequence[Any]) -> tuple[tuple[str, str, str], Any, Any] | None:
    """The three index lists of an equation of two operands, and these; None for others."""
    equation, *operands = args
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = list(operands[0])
    if not isinstance(equation, str) or len(operands) != 2 or "->" not in equation:
        return None
    inputs, out = equation.replace(" ", "").split("->")
    left, right = inputs.split(",")
    return (left, right, out), operands[0], operands[1]


def _is_product(indices: tuple[str, str, str]) -> bool:
    """``bic,bjc->bij``: queries and keys in rows."""
    left, right, out = indices
    batch, rest = left[:-2], left[-2:]
    return right[:-2] == batch and right[-1] == rest[1] and out == batch + rest[0] + right[-2]


def _is_average(indices: tuple[str, str, str]) -> bool:
    """``bij,bjd->bid``: weights and values in rows."""
    left, right, out = indices
    batch, rest = left[:-2], left[-2:]
    return right[:-2] == batch and right[-2] == rest[1] and out == batch + rest[0] + right[-1]


class Scores:
    """A product ``q @ kt`` that was put off, and what was done to it since. Stands in for the
    tensor ``[..., Nq, Nk]`` in the host's own code."""

    def __init__(self, lift: Lift, q: Tensor, kt: Tensor) -> None:
        self.lift, self.home, self.q, self.kt = lift, lift.home(), q, kt
        lead = torch.broadcast_shapes(q.shape[:-2], kt.shape[:-2])
        self.shape = self.made_as = torch.Size((*lead, q.shape[-2], kt.shape[-1]))
        self.dtype, self.device = q.dtype, q.device
        self.factor: float = 1.0
        self.terms: Terms = ()
        self.softmaxed, self.dropout, self.flipped = False, 0.0, False
        self.part_of: tuple[Scores, tuple[int, int]] | None = None
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
        """The same scores with other fields."""
        other = Scores.__new__(Scores)
        other.__dict__.update(self.__dict__)
        other.__dict__.update(fields)
        return other

    def tensor(self, because: str = "") -> Tensor:
        """The scores (or weights) themselves, computed as the host would have."""
        if self.value is None:
            self.lift.refuse(self, because)
            self.lift.idle = True
            try:
                self.value = self._compute()
            finally:
                self.lift.idle = False
        return self.value

    def _compute(self) -> Tensor:
        x = (self.q @ self.kt) * self.factor
        x = x.reshape(self.shape if not self.flipped else _flip(self.shape))
        bias = self.bias()
        if bias is not None:
            x = x + bias
        if self.softmaxed:
            x = F.dropout(x.softmax(-1), self.dropout)
        return x.transpose(-2, -1) if self.flipped else x

    def bias(self) -> Tensor | None:
        """What was added to the scores, broadcastable to their present shape."""
        shape = _flip(self.shape) if self.flipped else self.shape
        found = None
        for term, then in self.terms:
            fitted = term if then == shape else term.expand(then).reshape(shape)
            found = fitted if found is None else found + fitted
        return found

    def attend(self, v: Tensor) -> Tensor:
        """``[..., Nq, Dv]``, by scaled dot product attention."""
        shape = _flip(self.shape) if self.flipped else self.shape
        q, k, mask = self.q, self.kt.transpose(-2, -1), self.bias()
        if shape != self.made_as:
            q, k = (x.reshape(*shape[:-2], *x.shape[-2:]) for x in (q, k))
        if mask is not None:
            mask = mask[(None,) * (len(shape) - mask.dim())].to(v.dtype)
        return self.lift.attend(
            q.to(v.dtype), k.to(v.dtype), v, mask, self.dropout, scale=self.factor
        )


def _flip(shape: tuple[int, ...]) -> torch.Size:
    return torch.Size((*shape[:-2], shape[-1], shape[-2]))


def computed(name: str, values: Any) -> Any:
    """Arguments with scores replaced by their values."""
    if isinstance(values, Scores):
        return values.tensor(name)
    if isinstance(values, dict):
        return {key: computed(name, value) for key, value in values.items()}
    if type(values) in (list, tuple):
        return type(values)(computed(name, value) for value in values)
    return values


def _method(name: str, scores: Scores, *args: Any, **kwargs: Any) -> Any:
    """A method of the host's supposed tensor."""
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
    """An operation in place: whoever holds the scores, or what they are a view of, sees it."""
    if scores.part_of is not None:
        raise NotImplementedError("an operation in place on a part of attention scores")
    held: Scores | None = scores
    while held is not None:
        held.q, held.factor, held.terms = result.q, result.factor, result.terms
        held = held.view_of
    return scores


def _apply(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """What the host's operation makes of scores that are still put off, NotImplemented if only
    their values can tell."""
    operation = OPERATIONS.get(name)
    first = next((x for x in args if isinstance(x, Scores)), None)
    if operation is None or (first is not None and first.value is not None):
        return NotImplemented
    return operation(*args, **kwargs)


def _in_order(a: Any, b: Any) -> tuple[Any, Any]:
    """The operands of an operator as the host wrote them. Dynamo (torch 2.15) hands ``scores op
    tensor`` on as ``tensor op scores``; modules whose hosts write the latter are not lifted."""
    swapped = torch.compiler.is_compiling() and isinstance(a, Tensor) and isinstance(b, Scores)
    return (b, a) if swapped and not b.flipped else (a, b)


def _mul(a: Any, b: Any) -> Any:
    scores, other = (a, b) if isinstance(a, Scores) else (b, a)
    if scores.softmaxed or isinstance(other, Scores):
        return NotImplemented
    terms = tuple((term * other, shape) for term, shape in scores.terms)
    if isinstance(other, (int, float)):
        return scores.but(factor=scores.factor * other, terms=terms)
    even = other.numel() == 1 or (other.dim() > 1 and tuple(other.shape[-2:]) == (1, 1))
    if not even or other.dim() > scores.dim() or scores.shape != scores.made_as:
        return NotImplemented
    return scores.but(q=scores.q * other, terms=terms)


def _div(a: Any, b: Any, *, rounding_mode: str | None = None) -> Any:
    a, b = _in_order(a, b)
    if rounding_mode is not None or not isinstance(a, Scores) or isinstance(b, Scores):
        return NotImplemented
    return _mul(a, 1 / b)


def _add(a: Any, b: Any, *, alpha: float = 1) -> Any:
    scores, other = (a, b) if isinstance(a, Scores) else (b, a)
    if scores.softmaxed or not isinstance(other, Tensor) or alpha != 1:
        return NotImplemented
    if not _fits(other, scores.shape):
        return NotImplemented
    return scores.but(terms=(*scores.terms, (other, scores.shape)))


def _sub(a: Any, b: Any, *, alpha: float = 1) -> Any:
    a, b = _in_order(a, b)
    return _add(a, -b, alpha=alpha) if isinstance(b, Tensor) else NotImplemented


def _masked_fill(scores: Any, mask: Any, value: Any) -> Any:
    low = isinstance(value, (int, float)) and value <= FORBIDS
    if not low or not isinstance(scores, Scores) or scores.softmaxed:
        return NotImplemented
    if not _fits(mask, scores.shape):
        return NotImplemented
    filled = torch.zeros_like(mask, dtype=scores.dtype).masked_fill(mask, value)
    return scores.but(terms=(*scores.terms, (filled, scores.shape)))


def _fits(x: Tensor, shape: torch.Size) -> bool:
    """Whether a tensor broadcasts to a shape without making it larger."""
    sizes = zip(reversed(x.shape), reversed(shape), strict=False)
    return x.dim() <= len(shape) and all(a in (1, b) for a, b in sizes)


def _view(scores: Any, *sizes: Any) -> Any:
    if not isinstance(scores, Scores) or scores.flipped:
        return NotImplemented
    given = sizes[0] if len(sizes) == 1 and isinstance(sizes[0], (list, tuple)) else sizes
    if not all(isinstance(size, (int, torch.SymInt)) for size in given):
        return NotImplemented
    known = math.prod([size for size in given if size != -1])
    shape = [math.prod(scores.shape) // known if size == -1 else size for size in given]
    return scores.but(shape=torch.Size(shape), view_of=scores)


def _unsqueeze(scores: Any, dim: int) -> Any:
    shape = list(scores.shape)
    if dim < 0 or dim > len(shape) - 2:
        return NotImplemented
    shape.insert(dim, 1)
    return _view(scores, shape)


def _squeeze(scores: Any, dim: int | None = None) -> Any:
    if dim is None or dim < 0 or dim > scores.dim() - 3 or scores.shape[dim] != 1:
        return NotImplemented
    return _view(scores, [*scores.shape[:dim], *scores.shape[dim + 1 :]])


def _softmax(scores: Any, dim: Any = None, *_: Any, **__: Any) -> Any:
    """Further arguments (a dtype to compute in) are the kernels' own concern."""
    if not isinstance(scores, Scores) or scores.softmaxed or dim not in (-1, scores.dim() - 1):
        return NotImplemented
    return scores.but(softmaxed=True)


def _dropout(scores: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
    if not isinstance(scores, Scores) or not scores.softmaxed:
        return NotImplemented
    return scores.but(dropout=p) if training else scores


def _same(scores: Any, *_: Any, **__: Any) -> Any:
    """Changes of precision or memory layout, which kernels choose themselves."""
    return scores if isinstance(scores, Scores) else NotImplemented


def _transpose(scores: Any, a: int, b: int) -> Any:
    last = {scores.dim() - 2, scores.dim() - 1}
    if not scores.softmaxed or {a % scores.dim(), b % scores.dim()} != last:
        return NotImplemented
    return scores.but(flipped=not scores.flipped, shape=_flip(scores.shape))


def _matmul(a: Any, b: Any) -> Any:
    a, b = _in_order(a, b)
    if isinstance(a, Scores) and _meet(a, b, flipped=False):
        return a.attend(b)
    if isinstance(b, Scores) and _meet(b, a, flipped=True):
        # hosts take views of a product, which is contiguous
        return b.attend(a.transpose(-2, -1)).transpose(-2, -1).contiguous()
    return NotImplemented


def _meet(weights: Scores, values: Any, flipped: bool) -> bool:
    """Whether these are attention weights of a plain form, about to average these values."""
    if not isinstance(values, Tensor) or values.dim() != weights.dim():
        return False
    if weights.home != weights.lift.home():
        return False
    shape = _flip(weights.shape) if flipped else weights.shape
    plain = weights.softmaxed and weights.flipped == flipped and weights.part_of is None
    return plain and shape[-2:] == weights.made_as[-2:] and values.shape[:-2] == shape[:-2]


def _einsum_of(*args: Any) -> Any:
    found = _einsum(args)
    if found is None or not _is_average(found[0]):
        return NotImplemented
    return _matmul(found[1], found[2])


def _getitem(scores: Any, key: Any) -> Any:
    """``[..., i:, j:]``: the scores between patches, without those of class tokens."""
    starts = _starts(key, scores.dim()) if isinstance(scores, Scores) else None
    if starts is None or scores.terms or scores.softmaxed or scores.part_of is not None:
        return NotImplemented
    i, j = starts
    part = Scores(scores.lift, scores.q[..., i:, :], scores.kt[..., j:])
    return part.but(factor=scores.factor, part_of=(scores, starts))


def _starts(key: Any, dim: int) -> tuple[int, int] | None:
    """Where the slices of the last two dimensions start, if the others are taken whole."""
    if not isinstance(key, tuple) or len(key) != dim or not all(type(s) is slice for s in key):
        return None
    if any(s.stop is not None or s.step is not None for s in key):
        return None
    *lead, i, j = (s.start or 0 for s in key)
    return None if any(lead) else (i, j)


def _setitem(scores: Any, key: Any, value: Any) -> Any:
    """A part goes back where it was taken from, with what was added to it meanwhile."""
    if not isinstance(value, Scores) or not isinstance(scores, Scores) or value.part_of is None:
        return NotImplemented
    origin, (i, j) = value.part_of
    same = origin is scores and _starts(key, scores.dim()) == (i, j)
    whole = value.shape == (*scores.shape[:-2], scores.shape[-2] - i, scores.shape[-1] - j)
    if not same or not whole or value.factor != scores.factor or value.softmaxed:
        return NotImplemented
    bias = value.bias()
    if bias is not None:
        padded = F.pad(bias.expand(value.shape), (j, 0, i, 0))
        scores.terms = (*scores.terms, (padded, scores.shape))
    return None


OPERATIONS: dict[str, Callable[..., Any]] = {
    "mul": _mul,
    "rmul": _mul,
    "imul": _mul,
    "multiply": _mul,
    "div": _div,
    "truediv": _div,
    "itruediv": _div,
    "true_divide": _div,
    "add": _add,
    "radd": _add,
    "iadd": _add,
    "sub": _sub,
    "isub": _sub,
    "masked_fill": _masked_fill,
    "view": _view,
    "reshape": _view,
    "unsqueeze": _unsqueeze,
    "squeeze": _squeeze,
    "softmax": _softmax,
    "dropout": _dropout,
    "to": _same,
    "type_as": _same,
    "float": _same,
    "contiguous": _same,
    "transpose": _transpose,
    "swapaxes": _transpose,
    "matmul": _matmul,
    "bmm": _matmul,
    "einsum": _einsum_of,
    "getitem": _getitem,
    "setitem": _setitem,
}

_OPERATORS = (
    *("mul", "rmul", "imul", "truediv", "itruediv", "rtruediv", "add", "radd", "iadd", "sub"),
    *("rsub", "isub", "matmul", "rmatmul", "getitem", "setitem", "neg", "pow", "rpow", "abs"),
    *("lt", "le", "gt", "ge", "len", "iter", "bool", "float"),
)
for _name in _OPERATORS:
    # operators are looked up on the class, past `__getattr__`
    setattr(Scores, f"__{_name}__", _operator(f"__{_name}__"))
