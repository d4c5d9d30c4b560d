"""Plans that choose no keys: attention to computed ones, by given logits, or a given output.

`Pattern.computed_keys`, `Pattern.logits` and `Pattern.output` make them. No pair is dropped, so masks are
full; what is saved is in `ComputedPattern.macs`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsiattn.attention.patterns import Pattern
from sparsiattn.attention.site import AttentionInputs
from sparsiattn.errors import InvalidOption

DenseAttention = Callable[[AttentionInputs], Tensor]


class ComputedPattern(Pattern):
    """What attention gives other than the host's own weights over the host's own keys."""

    def to_mask(self) -> Tensor:
        """All True: every key has its part in the result."""
        return torch.ones(1, 1, self.n_queries, self.n_keys, dtype=torch.bool)

    def macs(self, dim: int, value_dim: int) -> float:
        raise NotImplementedError

    def attend(self, inputs: AttentionInputs, dense: DenseAttention) -> Tensor:
        """The result, ``[B, H, Nq, Dv]``. dense: how the kernel attends to every key of a call."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class Computed(ComputedPattern):
    """Patch queries attend to computed keys and values, prefix queries to the host's own.

    k: ``[B, H, M, D']``; v: ``[B, H, M, Dv]``; q: ``[B, H, n, D']``, None for the host's; bias:
    ``[B|1, H|1, n|1, M]``, as in `AttentionInputs`. dense_rows: number of prefix queries.
    """

    n_queries: int
    n_keys: int
    k: Tensor
    v: Tensor
    q: Tensor | None = None
    bias: Tensor | None = None
    dense_rows: int = 0

    def pairs(self) -> float:
        rows = self.n_queries - self.dense_rows
        return float(self.dense_rows * self.n_keys + rows * self.k.shape[-2])

    def macs(self, dim: int, value_dim: int) -> float:
        own = self.dense_rows * self.n_keys
        return own * (dim + value_dim) + (self.pairs() - own) * (self.k.shape[-1] + value_dim)

    def attend(self, inputs: AttentionInputs, dense: DenseAttention) -> Tensor:
        q = inputs.patch_queries if self.q is None else self.q.to(inputs.q.dtype)
        k, v = self.k.to(inputs.k.dtype), self.v.to(inputs.v.dtype)
        rows = dense(inputs.replace(q=q, k=k, v=v, bias=self.bias))
        if not self.dense_rows:
            return rows
        bias = inputs.bias
        if bias is not None and bias.shape[-2] > 1:
            bias = bias[..., : self.dense_rows, :]
        own = dense(inputs.replace(q=inputs.q[..., : self.dense_rows, :], bias=bias))
        return torch.cat([own, rows], dim=-2)


@dataclass(frozen=True, eq=False)
class Logits(ComputedPattern):
    """Weights from logits that planning gave, ``[B|1, H|1, Nq, Nk]``, on the host's values."""

    n_queries: int
    n_keys: int
    values: Tensor

    def pairs(self) -> float:
        return float(self.n_queries * self.n_keys)

    def macs(self, dim: int, value_dim: int) -> float:
        return self.pairs() * value_dim

    def attend(self, inputs: AttentionInputs, dense: DenseAttention) -> Tensor:
        dtype = torch.promote_types(inputs.v.dtype, torch.float32)
        logits = inputs.biased(self.values.to(dtype))
        dead = (logits == float("-inf")).all(-1, keepdim=True)
        weights = logits.masked_fill(dead, 0.0).softmax(-1).masked_fill(dead, 0.0)
        if inputs.dropout:
            weights = F.dropout(weights, inputs.dropout)
        return (weights.to(inputs.v.dtype) @ inputs.v).expand(*inputs.q.shape[:-1], -1)


@dataclass(frozen=True, eq=False)
class Output(ComputedPattern):
    """What attention would return, ``[B, H, Nq, Dv]``, known without it."""

    n_queries: int
    n_keys: int
    value: Tensor

    def pairs(self) -> float:
        return 0.0

    def macs(self, dim: int, value_dim: int) -> float:
        return 0.0

    def attend(self, inputs: AttentionInputs, dense: DenseAttention) -> Tensor:
        return self.value.to(inputs.q.dtype)


def computed_keys(
    inputs: AttentionInputs, k: Tensor, v: Tensor, q: Tensor | None, bias: Tensor | None
) -> Computed:
    """See `Pattern.computed_keys`."""
    lead, rows = inputs.q.shape[:2], inputs.n_queries - inputs.prefix
    dim = (inputs.q if q is None else q).shape[-1]
    _check(inputs, "k", k, (*lead, "M", dim))
    _check(inputs, "v", v, (*lead, k.shape[-2], inputs.v.shape[-1]))
    if q is not None:
        _check(inputs, "q", q, (*lead, rows, "D'"))
    if bias is not None:
        _check_broadcasts(inputs, "bias", bias, (*lead, rows, k.shape[-2]))
    return Computed(inputs.n_queries, inputs.n_keys, k, v, q, bias, inputs.prefix)


def by_logits(inputs: AttentionInputs, values: Tensor) -> Logits:
    """See `Pattern.logits`."""
    wanted = (*inputs.q.shape[:2], inputs.n_queries, inputs.n_keys)
    _check_broadcasts(inputs, "logits", values, wanted)
    if values.shape[-2:] != wanted[-2:]:
        raise _misfit(inputs, "logits", values, wanted)
    return Logits(inputs.n_queries, inputs.n_keys, values)


def output(inputs: AttentionInputs, value: Tensor) -> Output:
    """See `Pattern.output`."""
    _check(inputs, "value", value, (*inputs.q.shape[:3], inputs.v.shape[-1]))
    return Output(inputs.n_queries, inputs.n_keys, value)


def _check(inputs: AttentionInputs, name: str, x: Tensor, wanted: tuple[int | str, ...]) -> None:
    if x.dim() != len(wanted) or any(
        isinstance(size, int) and x.shape[i] != size for i, size in enumerate(wanted)
    ):
        raise _misfit(inputs, name, x, wanted)


def _check_broadcasts(
    inputs: AttentionInputs, name: str, x: Tensor, wanted: tuple[int, ...]
) -> None:
    if x.dim() != 4 or any(a not in (1, b) for a, b in zip(x.shape, wanted, strict=True)):
        raise _misfit(inputs, name, x, wanted)


def _misfit(
    inputs: AttentionInputs, name: str, x: Tensor, wanted: tuple[int | str, ...]
) -> InvalidOption:
    sizes = ", ".join(map(str, wanted))
    return InvalidOption(
        f"site {inputs.site.name!r} needs {name} of shape [{sizes}], got {tuple(x.shape)}; "
        "queries here are those of patches, prefix tokens left out"
        if name in ("q", "bias")
        else f"site {inputs.site.name!r} needs {name} of shape [{sizes}], got {tuple(x.shape)}"
    )
