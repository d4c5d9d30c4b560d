"""Tracks which axes of a value hold tokens, operator by operator.

Tokens can be left out of a branch that processes every token independently. There are rules for
known operators; an operator without a rule is assumed to combine several tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from sparsiattn.runtime.hook_tools import tensors_in

Axes = frozenset[int]


Rule = Callable[["Call"], "Axes | None"]


class TokensMeet(Exception):
    """An operator combines several tokens, or depends on the positions of tokens."""


@dataclass(frozen=True)
class Call:
    """One call of an operator.

    Attributes:
        func: The operator.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        out: Its result.
        axes: Token axes of each tensor, by its id; empty if the tensor does not depend on the
            tokens.
        grid: Sizes of the token axes at the start of the branch.
    """

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any
    axes: dict[int, Axes]
    grid: tuple[int, ...]

    def __getitem__(self, name: str) -> Any:
        """An argument by name, or its default."""
        for i, argument in enumerate(self.func._schema.arguments):
            if argument.name == name:
                positional = i < len(self.args) and not argument.kwarg_only
                return self.args[i] if positional else self.kwargs.get(name, argument.default_value)
        raise TokensMeet

    def of(self, x: Any) -> Axes:
        """The token axes of an argument."""
        return self.axes.get(id(x), frozenset())

    @property
    def input(self) -> Tensor:
        """The first argument, which must depend on the tokens."""
        if not self.of(self.args[0]):
            raise TokensMeet
        return self.args[0]  # type: ignore[no-any-return]


def axes_after(call: Call) -> Axes | None:
    """The token axes of an operator's results; None if they do not depend on the tokens.

    Raises:
        TokensMeet: The operator does not process each token independently.
    """
    name = call.func._schema.name.removeprefix("aten::")
    rule = _RULES.get(name) or _RULES.get(name.removesuffix("_"))
    if rule is None and torch.Tag.pointwise in call.func.tags:
        rule = _pointwise
    if rule is None:
        raise TokensMeet
    return rule(call)


def _need(condition: bool) -> None:
    if not condition:
        raise TokensMeet


def _apart(axes: Axes, dims: Iterable[int], rank: int) -> None:
    _need(not axes & {dim % rank for dim in dims})


def _pointwise(call: Call) -> Axes:
    rank = tensors_in(call.out)[0].dim()
    operands = tensors_in((call.args, call.kwargs))
    aligned = {frozenset(d + rank - x.dim() for d in call.of(x)) for x in operands if call.of(x)}
    _need(len(aligned) == 1)
    axes = aligned.pop()
    for x in operands:
        # operands that do not come from the tokens must be the same for all tokens
        here = [d - rank + x.dim() for d in axes if not call.of(x)]
        _need(all(x.shape[d] == 1 for d in here if d >= 0))
    return axes


def _like_input(call: Call) -> Axes:
    _need(all(not call.of(x) for x in tensors_in((call.args[1:], call.kwargs))))
    return call.of(call.input)


def _same_shape(call: Call) -> Axes:
    return call.of(call.input)


def _unrelated(call: Call) -> None:
    return None


def _view(call: Call) -> Axes:
    old, new, axes = call.input.shape, tensors_in(call.out)[0].shape, sorted(call.of(call.input))
    if old == new:
        return frozenset(axes)
    first, last = axes[0], axes[-1]
    _need(len(axes) == last - first + 1)
    lead, count = prod(old[:first]), prod(old[first : last + 1])
    # axes before the tokens may be merged with them, [B, n, C] -> [B n, C], and split again
    for start in reversed(range(len(new))):
        for sides in (1, len(call.grid)):
            part, stop = new[start : start + sides], start + sides
            alike = part == call.grid if sides > 1 else prod(part) % prod(call.grid) == 0
            if alike and prod(new[:stop]) == lead * count:
                return frozenset(range(start, stop))
    raise TokensMeet


def _permute(call: Call) -> Axes:
    order = [dim % call.input.dim() for dim in call["dims"]]
    return frozenset(order.index(axis) for axis in call.of(call.input))


def _transpose(call: Call) -> Axes:
    a, b = (call[name] % call.input.dim() for name in ("dim0", "dim1"))
    return frozenset({a: b, b: a}.get(axis, axis) for axis in call.of(call.input))


def _t(call: Call) -> Axes:
    return frozenset(call.input.dim() - 1 - axis for axis in call.of(call.input))


def _unsqueeze(call: Call) -> Axes:
    dim = call["dim"] % (call.input.dim() + 1)
    return frozenset(axis + (axis >= dim) for axis in call.of(call.input))


def _squeeze(call: Call) -> Axes:
    x, axes = call.input, call.of(call.input)
    dims: Any = range(x.dim())
    if len(call.args) > 1:
        dims = call.args[1] if isinstance(call.args[1], Sequence) else [call.args[1]]
    gone = {dim % x.dim() for dim in dims if x.shape[dim] == 1}
    _need(not axes & gone)
    return frozenset(axis - sum(dim < axis for dim in gone) for axis in axes)


def _expand(call: Call) -> Axes:
    more = tensors_in(call.out)[0].dim() - call.input.dim()
    return frozenset(axis + more for axis in call.of(call.input))


def _along(call: Call) -> Axes:
    """For operators along one axis: a part of it, halves, a softmax."""
    _apart(call.of(call.input), [call["dim"]], call.input.dim())
    return call.of(call.input)


def _slice(call: Call) -> Axes:
    keeps_all = call.out.shape == call.input.shape
    return call.of(call.input) if keeps_all else _along(call)


def _select(call: Call) -> Axes:
    dim = call["dim"] % call.input.dim()
    return frozenset(axis - (axis > dim) for axis in _along(call))


def _unbind(call: Call) -> Axes:
    return _select(call)


def _cat(call: Call) -> Axes:
    parts = call.args[0]
    _need(len({call.of(x) for x in parts}) == 1 and bool(call.of(parts[0])))
    _apart(call.of(parts[0]), [call["dim"]], parts[0].dim())
    return call.of(parts[0])


def _reduce(call: Call) -> Axes:
    x = call.input
    dims = call["dim"]
    dims = dims if isinstance(dims, Sequence) else [dims]
    _need(bool(dims) and None not in dims)
    _apart(call.of(x), dims, x.dim())
    gone = set() if call["keepdim"] else {dim % x.dim() for dim in dims}
    return frozenset(axis - sum(dim < axis for dim in gone) for axis in call.of(x))


def _layer_norm(call: Call) -> Axes:
    x, sides = call.input, len(call["normalized_shape"])
    _apart(call.of(x), range(x.dim() - sides, x.dim()), x.dim())
    return _like_input(call)


def _batch_norm(call: Call) -> Axes:
    """Batch norm with running statistics; statistics of the batch would combine tokens."""
    training = any(a.name == "training" for a in call.func._schema.arguments) and call["training"]
    _need(not training)
    _apart(call.of(call.input), [1], call.input.dim())
    return _like_input(call)


def _convolution(call: Call) -> Axes:
    """A convolution with a 1 x 1 kernel, with tokens along spatial axes or in the batch."""
    x, weight = call.input, call["weight"]
    _need(not call.of(weight) and not call["transposed"])
    for axis in call.of(x) - {0}:
        _need(axis >= 2 and weight.shape[axis] == 1)
        _need(all(_side(call[name], axis) == n for name, n in (("stride", 1), ("padding", 0))))
    return _like_input(call)


def _side(sizes: Sequence[int], axis: int) -> int:
    return sizes[0] if len(sizes) == 1 else sizes[axis - 2]


def _matrix_product(call: Call) -> Axes:
    """The product of the last two arguments, ``a`` and ``b``; a bias may come before them."""
    bias, (a, b) = call.args[:-2], call.args[-2:]
    of_a, of_b, rank = call.of(a), call.of(b), a.dim()
    batch = frozenset(range(rank - 2))
    rows, columns = frozenset({rank - 2}), frozenset({rank - 1})
    _need(not of_a & columns and not of_b & rows)  # sums over tokens
    if of_a and of_b:
        _need(of_a == of_b and of_a <= batch)
    axes = of_a or of_b
    _need(not (axes & batch) or bool(of_a and of_b) or prod((b if of_a else a).shape[:-2]) == 1)
    for x in bias:
        lead = rank - x.dim()
        _need(not call.of(x) and all(x.shape[d - lead] == 1 for d in axes if d >= lead))
    return axes


def _linear(call: Call) -> Axes:
    _apart(call.of(call.input), [-1], call.input.dim())
    return _like_input(call)


def _by(rule: Rule, names: str) -> dict[str, Rule]:
    return dict.fromkeys(names.split(), rule)


_RULES: dict[str, Rule] = {
    **_by(_same_shape, "clone _to_copy detach alias contiguous lift_fresh native_dropout dropout"),
    **_by(_same_shape, "bernoulli zeros_like ones_like empty_like full_like rand_like randn_like"),
    **_by(_unrelated, "new_empty new_zeros new_ones new_full new_empty_strided"),
    **_by(_pointwise, "gelu hardswish mish celu selu hardtanh log_sigmoid_forward _prelu_kernel"),
    **_by(_view, "view _unsafe_view reshape _reshape_copy _reshape_alias"),
    **_by(_permute, "permute"),
    **_by(_transpose, "transpose"),
    **_by(_t, "t"),
    **_by(_unsqueeze, "unsqueeze"),
    **_by(_squeeze, "squeeze"),
    **_by(_expand, "expand"),
    **_by(_along, "split split_with_sizes chunk narrow glu _softmax _log_softmax _safe_softmax"),
    **_by(_slice, "slice"),
    **_by(_select, "select"),
    **_by(_unbind, "unbind"),
    **_by(_cat, "cat"),
    **_by(_reduce, "sum mean amax amin var var_mean std linalg_vector_norm norm max min argmax"),
    **_by(_layer_norm, "native_layer_norm _fused_rms_norm rms_norm"),
    **_by(_batch_norm, "native_batch_norm _native_batch_norm_legit"),
    **_by(_batch_norm, "_native_batch_norm_legit_no_training"),
    **_by(_convolution, "convolution"),
    **_by(_matrix_product, "mm bmm addmm baddbmm"),
    **_by(_linear, "linear"),
}
