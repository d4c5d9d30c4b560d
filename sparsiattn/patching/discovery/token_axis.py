"""The token axis of a tensor, and how an operation changes it.

`follow` has rules for the operations that are still correct with fewer tokens: those that treat
every token alike, select leading tokens, or pool all of them. Any other operation counts as reading
positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

Kind = Literal["values", "weights", "weighted", "noise", "positions"]
"""What the axis holds: token values, softmax weights, values times weights, noise, or positions."""


class ReadsPositions(Exception):
    """An operation needs every token at its own position."""


@dataclass(frozen=True)
class TokenAxis:
    """The token axis of a tensor.

    Attributes:
        dim: Its dimension.
        count: Number of tokens.
        lead: How many leading tokens are never dropped or merged (class tokens, registers).
        run: Index of the run of a block that the tokens come from.
        outer: Size of dimensions that are flattened into it before the tokens (a batch).
        inner: Size of dimensions that are flattened into it after the tokens.
        kind: What the axis holds.
        rows: Number of sequences in the batch, if several may be of one image; see `token_rows`.
            Else 1.
    """

    dim: int
    count: int
    lead: int
    run: int
    outer: int = 1
    inner: int = 1
    kind: Kind = "values"
    rows: int = 1

    @property
    def alone(self) -> bool:
        """Whether the dimension holds only the tokens."""
        return self.outer == self.inner == 1


Outcome = TokenAxis | None | list[TokenAxis | None]
"""The token axis of the result, None if it has none; a list for several results."""


@dataclass
class Operation:
    """One operation on tensors with tokens.

    Attributes:
        func: The operator.
        args: Its arguments by name.
        out: Its result.
        axis_of: Function that returns the token axis of a tensor, None if it has none.
        pooled: Receives the ways in which the axis was reduced.
    """

    func: Any
    args: dict[str, Any]
    out: Any
    axis_of: Callable[[Any], TokenAxis | None]
    pooled: set[str] = field(default_factory=set)

    @property
    def name(self) -> str:
        """Name of the operator, without its overload."""
        return str(self.func.overloadpacket.__name__).rstrip("_")

    def tensors(self) -> list[Tensor]:
        """Its tensor arguments, in order."""
        return [x for x in tree_leaves(list(self.args.values())) if isinstance(x, Tensor)]

    def axes(self) -> list[tuple[Tensor, TokenAxis]]:
        """Its tensor arguments that have a token axis."""
        pairs = [(x, self.axis_of(x)) for x in self.tensors()]
        return [(x, axis) for x, axis in pairs if axis is not None]

    def only(self) -> tuple[Tensor, TokenAxis]:
        """The single argument with a token axis; raises if there are several."""
        if len(self.axes()) != 1:
            raise ReadsPositions(f"{self.name} of several sequences")
        return self.axes()[0]


def arguments(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """An operator's arguments by name, defaults included."""
    schema = func._schema.arguments
    named = {a.name: a.default_value for a in schema if a.has_default_value()}
    return named | {a.name: value for a, value in zip(schema, args, strict=False)} | kwargs


def follow(operation: Operation) -> Outcome:
    """The token axis after an operation.

    Raises:
        ReadsPositions: The operation is not known to be correct with fewer tokens.
    """
    if any(axis.kind == "positions" for _, axis in operation.axes()):
        raise ReadsPositions(f"{operation.name} of positions")
    fused = operation.name.startswith("_scaled_dot_product")
    rule = _attention if fused else _RULES.get(operation.name)
    if rule is None and torch.Tag.pointwise in operation.func.tags:
        rule = _pointwise
    if rule is None:
        raise ReadsPositions(operation.name)
    return rule(operation)


def _pointwise(operation: Operation) -> TokenAxis:
    rank = (operation.out if isinstance(operation.out, Tensor) else operation.out[0]).dim()
    placed = [replace(a, dim=rank - x.dim() + a.dim) for x, a in operation.axes()]
    axis = _agreed(placed, operation)
    for x in operation.tensors():
        dim = axis.dim - (rank - x.dim())
        if operation.axis_of(x) is None and dim >= 0 and x.shape[dim] != 1:
            raise ReadsPositions(f"{operation.name} with a separate value for every position")
    return replace(axis, kind=_mixed({a.kind for a in placed}, operation.name == "mul"))


def _agreed(axes: list[TokenAxis], operation: Operation) -> TokenAxis:
    alike = {replace(axis, kind="values") for axis in axes}
    if len(alike) != 1:
        raise ReadsPositions(f"{operation.name} of different sequences")
    return alike.pop()


def _mixed(kinds: set[Kind], multiplied: bool) -> Kind:
    if kinds == {"noise"}:
        return "noise"
    if multiplied and kinds == {"weights", "values"}:
        return "weighted"
    if multiplied and "noise" in kinds and len(kinds) == 2:  # dropout
        return (kinds - {"noise"}).pop()
    return "values"


def _same(operation: Operation) -> Outcome:
    _, axis = operation.only()
    if isinstance(operation.out, Tensor):
        return axis
    return [axis, *(None for _ in operation.out[1:])]


def _like(operation: Operation) -> TokenAxis:
    return replace(operation.only()[1], kind="noise")


def _dropout(operation: Operation) -> Outcome:
    return [operation.only()[1], _like(operation)]


def _without(operation: Operation) -> None:
    """For new tensors whose size the host determines."""


def _view(operation: Operation) -> TokenAxis:
    x, axis = operation.only()
    before = prod(x.shape[: axis.dim]) * axis.outer
    after = axis.inner * prod(x.shape[axis.dim + 1 :])
    shape = operation.out.shape
    for dim, size in enumerate(shape):
        outer, inner = prod(shape[:dim]), prod(shape[dim + 1 :])
        if size >= axis.count and before % outer == 0 and after % inner == 0:
            return replace(axis, dim=dim, outer=before // outer, inner=after // inner)
    raise ReadsPositions("tokens laid out as a map")


def _permuted(operation: Operation) -> TokenAxis:
    x, axis = operation.only()
    order = list(range(x.dim()))
    if operation.name == "permute":
        order = [dim % x.dim() for dim in operation.args["dims"]]
    elif x.dim() > 1:
        a, b = (operation.args.get(name, i) % x.dim() for i, name in enumerate(("dim0", "dim1")))
        order[a], order[b] = b, a
    return replace(axis, dim=order.index(axis.dim))


def _unsqueezed(operation: Operation) -> TokenAxis:
    x, axis = operation.only()
    dim = operation.args["dim"] % (x.dim() + 1)
    return replace(axis, dim=axis.dim + (dim <= axis.dim))


def _squeezed(operation: Operation) -> TokenAxis:
    x, axis = operation.only()
    dims = operation.args.get("dim", range(x.dim()))
    dims = [dims] if isinstance(dims, int) else dims
    gone = {d % x.dim() for d in dims if x.shape[d] == 1 and d % x.dim() < axis.dim}
    return replace(axis, dim=axis.dim - len(gone))


def _expanded(operation: Operation) -> TokenAxis:
    x, axis = operation.only()
    return replace(axis, dim=axis.dim + operation.out.dim() - x.dim())


def _select(operation: Operation) -> TokenAxis | None:
    x, axis = operation.only()
    dim, index = operation.args["dim"] % x.dim(), operation.args["index"]
    if dim != axis.dim:
        return replace(axis, dim=axis.dim - (dim < axis.dim))
    if not (axis.alone and 0 <= index < axis.lead):
        raise ReadsPositions(f"the token at position {index}")
    operation.pooled.add("prefix")
    return None


def _slice(operation: Operation) -> TokenAxis | None:
    x, axis = operation.only()
    if operation.args["dim"] % x.dim() != axis.dim:
        return axis
    start, end = operation.args["start"] or 0, operation.args["end"]
    if operation.args["step"] != 1 or start < 0:
        raise ReadsPositions("tokens selected by position")
    return _part(operation, axis, start, axis.count if end is None else end)


def _part(operation: Operation, axis: TokenAxis, start: int, end: int) -> TokenAxis | None:
    """The token axis of the slice from ``start`` to ``end``."""
    if axis.alone and 0 <= end <= axis.lead:
        operation.pooled.add("prefix")
        return None
    if start == 0 and end >= axis.count * axis.outer * axis.inner:
        return axis
    if axis.alone and start <= axis.lead and end >= axis.count:
        return replace(axis, count=axis.count - start, lead=axis.lead - start)
    raise ReadsPositions(f"tokens {start} to {end} of {axis.count}")


def _pieces(operation: Operation) -> Outcome:
    x, axis = operation.only()
    dim, unbinds = operation.args["dim"] % x.dim(), operation.name == "unbind"
    if dim != axis.dim:
        axis = replace(axis, dim=axis.dim - (unbinds and dim < axis.dim))
        return [axis] * len(operation.out)
    if unbinds:
        raise ReadsPositions("tokens taken one by one")
    sizes = [piece.shape[dim] for piece in operation.out]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [
        _part(operation, axis, start, start + n) for start, n in zip(starts, sizes, strict=True)
    ]


def _joined(operation: Operation) -> TokenAxis:
    tensors, rank = operation.args["tensors"], operation.out.dim()
    dim, axes = operation.args["dim"] % rank, [operation.axis_of(x) for x in tensors]
    known = [axis for axis in axes if axis is not None]
    if operation.name == "stack":
        known = [replace(axis, dim=axis.dim + (dim <= axis.dim)) for axis in known]
    axis = _agreed(known, operation)
    if dim != axis.dim:
        if len(known) < len(tensors):
            raise ReadsPositions(f"{operation.name} with separate values for every position")
        return axis
    if len(known) > 1 or axes[-1] is None or not axis.alone:
        raise ReadsPositions("tokens concatenated before others")
    more = sum(x.shape[dim] for x in tensors[:-1])  # for example a class token added late
    return replace(axis, count=axis.count + more, lead=axis.lead + more)


def _reduced(operation: Operation) -> Outcome:
    x, axis = operation.only()
    dims = operation.args.get("dim")
    dims = list(range(x.dim())) if dims is None or dims == [] else dims
    dims = {d % x.dim() for d in ([dims] if isinstance(dims, int) else dims)}
    if axis.dim in dims:
        return _pooled(operation, axis)
    if not operation.args.get("keepdim"):
        axis = replace(axis, dim=axis.dim - sum(d < axis.dim for d in dims))
    axis = replace(axis, kind="values")
    return axis if isinstance(operation.out, Tensor) else [axis] * len(operation.out)


def _pooled(operation: Operation, axis: TokenAxis) -> Outcome:
    """Pooling over all tokens, which is correct if their weights are."""
    name = operation.name
    alike = axis.kind == "values" and (axis.lead == 0 or name in ("amax", "max"))
    allowed = alike and name in ("mean", "amax", "max", "logsumexp")
    if not axis.alone or not (allowed or (name == "sum" and axis.kind == "weighted")):
        raise ReadsPositions(f"{name} over tokens")
    operation.pooled.add("attention" if name == "sum" else name)
    if isinstance(operation.out, Tensor):
        return None
    return [None, replace(axis, dim=0, kind="positions")]


def _softmax(operation: Operation) -> TokenAxis:
    x, axis = operation.only()
    if operation.args["dim"] % x.dim() != axis.dim:
        return replace(axis, kind="values")
    if not axis.alone or operation.name == "_log_softmax":
        raise ReadsPositions(f"{operation.name} over tokens")
    return replace(axis, kind="weights")


def _normalised(operation: Operation) -> Outcome:
    x, axis = operation.axes()[0]
    if axis.dim >= x.dim() - len(operation.args["normalized_shape"]) or len(operation.axes()) > 1:
        raise ReadsPositions("a norm over tokens")
    return [replace(axis, kind="values"), *(None for _ in operation.out[1:])]


def _batch_normalised(operation: Operation) -> Outcome:
    _, axis = operation.only()
    if axis.dim == 1 or operation.args.get("training"):
        raise ReadsPositions("a batch norm over tokens")
    return [axis, *(None for _ in operation.out[1:])]


def _product(operation: Operation) -> TokenAxis | None:
    names = ("self", "mat2") if operation.name in ("mm", "bmm") else ("mat1", "mat2")
    names = ("batch1", "batch2") if operation.name == "baddbmm" else names
    left, right = (operation.args[name] for name in names)
    bias = operation.args["self"] if "self" not in names else None
    a, b, last = operation.axis_of(left), operation.axis_of(right), left.dim() - 1
    if a is not None and b is not None:
        return _paired(operation, a, b, last)
    axis = a if b is None else b
    rows, columns = a is not None and a.dim == last - 1, b is not None and b.dim == last
    if axis is None or not (rows or columns):
        raise ReadsPositions("a separate weight for every position")
    dim = last if columns else last - 1
    if bias is not None:
        across = dim - (left.dim() - bias.dim())
        if operation.axis_of(bias) is not None or (across >= 0 and bias.shape[across] != 1):
            raise ReadsPositions("a separate bias for every position")
    return replace(axis, dim=dim, kind="values")


def _paired(operation: Operation, a: TokenAxis, b: TokenAxis, last: int) -> TokenAxis | None:
    """A product of two tensors with tokens: a weighted mean, or one product per token."""
    placed = _agreed([replace(a, dim=0), replace(b, dim=0)], operation)
    if a.dim == b.dim == 0 and last == 2:
        return placed
    kinds = sorted((a.kind, b.kind))
    if (a.dim, b.dim) != (last, last - 1) or kinds != ["values", "weights"] or not a.alone:
        raise ReadsPositions("a product over tokens")
    operation.pooled.add("attention")
    return None


def _attention(operation: Operation) -> Outcome:
    q, k, v = (operation.axis_of(operation.args[name]) for name in ("query", "key", "value"))
    rest = [None] * (len(operation.out) - 1)
    if len(operation.axes()) == 1 and q is not None:
        return [replace(q, kind="values"), *rest]
    keys = operation.args["key"].dim() - 2
    plain = len(operation.axes()) == 2 and not operation.args.get("is_causal")
    mask = operation.args.get("attn_mask", operation.args.get("attn_bias"))
    if not plain or k is None or v is None or not k.dim == v.dim == keys or mask is not None:
        raise ReadsPositions("attention among tokens")
    operation.pooled.add("attention")
    return [None, *rest]


def _rules(*pairs: tuple[Callable[[Operation], Outcome], str]) -> dict[str, Any]:
    return {name: rule for rule, names in pairs for name in names.split()}


_RULES: dict[str, Callable[[Operation], Outcome]] = _rules(
    (_same, "detach alias clone _to_copy lift_fresh bernoulli fill zero set_data"),
    (_pointwise, "copy"),
    (_like, "empty_like zeros_like ones_like full_like rand_like randn_like"),
    (_without, "new_empty new_zeros new_ones new_full new_empty_strided"),
    (_dropout, "native_dropout"),
    (_view, "view _unsafe_view reshape _reshape_alias"),
    (_permuted, "transpose t permute"),
    (_unsqueezed, "unsqueeze"),
    (_squeezed, "squeeze"),
    (_expanded, "expand"),
    (_select, "select"),
    (_slice, "slice"),
    (_pieces, "split split_with_sizes unbind chunk"),
    (_joined, "cat stack"),
    (_reduced, "mean sum amax amin max min logsumexp var std var_mean linalg_vector_norm norm"),
    (_reduced, "any all argmax argmin prod"),
    (_softmax, "_softmax _safe_softmax _log_softmax"),
    (_normalised, "native_layer_norm _fused_rms_norm"),
    (_batch_normalised, "native_batch_norm _native_batch_norm_legit_no_training cudnn_batch_norm"),
    (_product, "mm bmm addmm baddbmm"),
)
