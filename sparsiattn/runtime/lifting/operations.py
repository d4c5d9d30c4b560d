"""Operations that hosts apply to attention scores before multiplying them with the values."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sparsiattn.runtime.lifting.equations import equation, is_average
from sparsiattn.runtime.lifting.scores import Scores, flip, operation

# A masked_fill with a value this low removes a key, whatever its score was.
FORBIDS = -1e4


def _in_order(a: Any, b: Any) -> tuple[Any, Any]:
    """The operands of an operator as the host wrote them.

    Dynamo (torch 2.15) passes ``scores op tensor`` on as ``tensor op scores``. Modules whose hosts
    write the second form are not lifted.
    """
    swapped = torch.compiler.is_compiling() and isinstance(a, Tensor) and isinstance(b, Scores)
    return (b, a) if swapped and not b.flipped else (a, b)


@operation("mul", "rmul", "imul", "multiply")
def _mul(a: Any, b: Any) -> Any:
    scores, other = (a, b) if isinstance(a, Scores) else (b, a)
    if scores.softmaxed or not isinstance(other, (int, float, Tensor)):
        return NotImplemented
    terms = tuple((term * other, shape) for term, shape in scores.terms)
    if isinstance(other, (int, float)):
        return scores.but(factor=scores.factor * other, terms=terms)
    even = other.numel() == 1 or (other.dim() > 1 and tuple(other.shape[-2:]) == (1, 1))
    if not even or other.dim() > scores.dim() or scores.shape != scores.made_as:
        return NotImplemented
    return scores.but(q=scores.q * other, terms=terms)


@operation("div", "truediv", "itruediv", "true_divide")
def _div(a: Any, b: Any, *, rounding_mode: str | None = None) -> Any:
    a, b = _in_order(a, b)
    if rounding_mode is not None or not isinstance(a, Scores) or isinstance(b, Scores):
        return NotImplemented
    return _mul(a, 1 / b)


@operation("add", "radd", "iadd")
def _add(a: Any, b: Any, *, alpha: float = 1) -> Any:
    scores, other = (a, b) if isinstance(a, Scores) else (b, a)
    if scores.softmaxed or not isinstance(other, Tensor) or alpha != 1:
        return NotImplemented
    if not _fits(other, scores.shape):
        return NotImplemented
    return scores.but(terms=(*scores.terms, (other, scores.shape)))


@operation("sub", "isub")
def _sub(a: Any, b: Any, *, alpha: float = 1) -> Any:
    a, b = _in_order(a, b)
    return _add(a, -b, alpha=alpha) if isinstance(b, Tensor) else NotImplemented


@operation("masked_fill")
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


@operation("view", "reshape")
def _view(scores: Any, *sizes: Any) -> Any:
    if not isinstance(scores, Scores) or scores.flipped:
        return NotImplemented
    if len(sizes) == 1 and isinstance(sizes[0], (list, tuple)):
        sizes = tuple(sizes[0])
    if not all(isinstance(size, (int, torch.SymInt)) for size in sizes):
        return NotImplemented
    known = math.prod([size for size in sizes if size != -1])
    shape = [math.prod(scores.shape) // known if size == -1 else size for size in sizes]
    return scores.but(shape=torch.Size(shape), view_of=scores)


@operation("reshape_as", "view_as")
def _view_as(x: Any, other: Any) -> Any:
    if isinstance(x, Scores):
        return _view(x, *other.shape) if isinstance(other, (Scores, Tensor)) else NotImplemented
    return x.reshape(other.shape)


@operation("unsqueeze")
def _unsqueeze(scores: Any, dim: int) -> Any:
    shape = list(scores.shape)
    if dim < 0 or dim > len(shape) - 2:
        return NotImplemented
    shape.insert(dim, 1)
    return _view(scores, shape)


@operation("squeeze")
def _squeeze(scores: Any, dim: int | None = None) -> Any:
    if dim is None or dim < 0 or dim > scores.dim() - 3:
        return NotImplemented
    if scores.shape[dim] != 1:
        return scores
    return _view(scores, [*scores.shape[:dim], *scores.shape[dim + 1 :]])


@operation("softmax")
def _softmax(scores: Any, dim: Any = None, *_: Any, **__: Any) -> Any:
    """Further arguments (the dtype to compute in) are ignored: kernels choose it themselves."""
    if not isinstance(scores, Scores) or scores.softmaxed or dim not in (-1, scores.dim() - 1):
        return NotImplemented
    return scores.but(softmaxed=True)


@operation("dropout")
def _dropout(scores: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
    if not isinstance(scores, Scores) or not scores.softmaxed:
        return NotImplemented
    return scores.but(dropout=p) if training else scores


@operation("to", "type_as", "float", "contiguous")
def _same(scores: Any, *_: Any, **__: Any) -> Any:
    """Changes of dtype or memory layout are ignored: kernels choose both themselves."""
    return scores if isinstance(scores, Scores) else NotImplemented


@operation("transpose", "swapaxes")
def _transpose(scores: Any, a: int, b: int) -> Any:
    last = {scores.dim() - 2, scores.dim() - 1}
    if not scores.softmaxed or {a % scores.dim(), b % scores.dim()} != last:
        return NotImplemented
    return scores.but(flipped=not scores.flipped, shape=flip(scores.shape))


@operation("matmul", "bmm")
def _matmul(a: Any, b: Any) -> Any:
    a, b = _in_order(a, b)
    if isinstance(a, Scores) and _meet(a, b, flipped=False):
        return a.attend(b)
    if isinstance(b, Scores) and _meet(b, a, flipped=True):
        # hosts call view() on a product, so it must be contiguous
        return b.attend(a.transpose(-2, -1)).transpose(-2, -1).contiguous()
    return NotImplemented


def _meet(weights: Scores, values: Any, flipped: bool) -> bool:
    """Whether these are attention weights without pending changes, and fit these values."""
    if not isinstance(values, Tensor) or values.dim() != weights.dim():
        return False
    if weights.home != weights.lift.home():
        return False
    shape = flip(weights.shape) if flipped else weights.shape
    plain = weights.softmaxed and weights.flipped == flipped and weights.part_of is None
    if shape != weights.made_as and weights.q.shape[:-2] != weights.kt.shape[:-2]:
        return False  # operands that broadcast cannot be viewed in the same way
    return plain and shape[-2:] == weights.made_as[-2:] and values.shape[:-2] == shape[:-2]


@operation("einsum")
def _einsum_of(*args: Any) -> Any:
    parsed = equation(args)
    if parsed is None or not is_average(parsed[0]):
        return NotImplemented
    return _matmul(*parsed[1:])


@operation("getitem")
def _getitem(scores: Any, key: Any) -> Any:
    """``[..., i:, j:]``: the scores between patches, without those of class tokens."""
    starts = _starts(key, scores.dim()) if isinstance(scores, Scores) else None
    if starts is None or scores.terms or scores.softmaxed or scores.part_of is not None:
        return NotImplemented
    i, j = starts
    part = Scores(scores.lift, scores.q[..., i:, :], scores.kt[..., j:])
    return part.but(factor=scores.factor, part_of=(scores, starts))


def _starts(key: Any, dim: int) -> tuple[int, int] | None:
    """Starts of the slices of the last two dimensions, if all other dimensions are complete."""
    if not isinstance(key, tuple) or len(key) != dim or not all(type(s) is slice for s in key):
        return None
    if any(s.stop is not None or s.step is not None for s in key):
        return None
    *lead, i, j = (s.start or 0 for s in key)
    return None if any(lead) else (i, j)


@operation("setitem")
def _setitem(scores: Any, key: Any, value: Any) -> Any:
    """A slice of the scores is written back, with the bias that was added to it meanwhile."""
    if not isinstance(value, Scores) or not isinstance(scores, Scores) or value.part_of is None:
        return NotImplemented
    origin, (i, j) = value.part_of
    same = origin is scores and _starts(key, scores.dim()) == (i, j)
    complete = value.shape == (*scores.shape[:-2], scores.shape[-2] - i, scores.shape[-1] - j)
    if not same or not complete or value.factor != scores.factor or value.softmaxed:
        return NotImplemented
    # `part += x` has added x to the scores already
    added_since = value.but(terms=value.terms[value.returned :])
    scores.add_part(added_since.bias(), (i, j))
    return None
