"""Patterns: which (query, key) pairs survive, as tensors.

A planner returns `Dense`, `Mask`, `Ranked` or a `ComputedPattern`. `Ranked` holds scores and a
budget; the core turns it into key lists (`sparsiattn.attention.key_lists`) once prefix tokens,
tiles and the host's masks are taken into account. Kernels compute these lists and other patterns.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsiattn.attention.background import Summary
from sparsiattn.attention.budget import Budget, check_budget, count_of
from sparsiattn.attention.inputs import AttentionInputs
from sparsiattn.errors import InvalidType, RenamedMembers

DenseAttention = Callable[[AttentionInputs], Tensor]


class Pattern(RenamedMembers):
    """Which of ``n_queries`` x ``n_keys`` pairs survive, and the summary that replaces the others.

    Planners make one with a static method of this class, or with `KeyIndex.of`.

    Attributes:
        n_queries: Number of queries, prefix included. For `Ranked`, the number of score rows: one
            per query, per patch query or per tile.
        n_keys: Number of keys, prefix included. For `Ranked`, the number of score columns.
        summary: Pooled keys that stand for the dropped ones; None if there are none.

    >>> Pattern.top(torch.tensor([[[[0.1, 0.7, 0.2]]]]), 2).to_mask().tolist()
    [[[[False, True, True]]]]
    """

    renamed_members: ClassVar[Mapping[str, str]] = {"over": "computed_keys"}

    n_queries: int
    n_keys: int
    summary: Summary | None = None

    def to_mask(self) -> Tensor:
        """Boolean ``[B|1, H|1, Nq, Nk]``, True where the pair survives. All True by default."""
        return torch.ones(1, 1, self.n_queries, self.n_keys, dtype=torch.bool)

    def describe(self) -> Hashable | None:
        """A hashable key of all that the choice of a kernel may depend on: shapes and counts.

        For patterns of plug-ins. The chosen kernel is cached for calls whose patterns return equal
        keys. Without an override (None), a kernel is chosen again in every call.
        """
        return None

    def pairs(self) -> float | None:
        """Number of logits per head, summary included; None if it depends on unknown values."""
        return float(self.n_queries * self.n_keys)

    def macs(self, dim: int, value_dim: int) -> float | None:
        """MACs of QK^T and AV of one head, including pooling of the summary keys.

        None where `pairs` is None.
        """
        pairs = self.pairs()
        if pairs is None:
            return None
        pooled = 0 if self.summary is None else self.summary.count * self.n_keys
        return (pairs + pooled) * (dim + value_dim)

    def summary_rows(self) -> Tensor | None:
        """The summary's logit for every query, ``[B|1, H|1, Nq, G]``; None without a summary."""
        return None if self.summary is None else self.summary.bias

    def attention_mask(self, inputs: AttentionInputs) -> tuple[Tensor, Tensor | None]:
        """The pattern combined with the host's mask; see `AttentionInputs.attention_mask`."""
        empty = isinstance(self, Mask)
        return inputs.attention_mask(self.to_mask(), self.summary_rows(), rows_can_be_empty=empty)

    def attend(self, inputs: AttentionInputs) -> Tensor:
        """Attention over the surviving pairs by torch's masked attention, ``[B, H, Nq, Dv]``."""
        return inputs.masked_attention(*self.attention_mask(inputs), self.summary)

    @staticmethod
    def dense(n_queries: int, n_keys: int) -> Pattern:
        """A pattern in which every pair survives."""
        return Dense(n_queries, n_keys)

    @staticmethod
    def mask(mask: Tensor) -> Pattern:
        """Keep the pairs where a boolean mask is True.

        Args:
            mask: ``[B|1, H|1, Nq, Nk]``.

        Raises:
            InvalidType: The mask is not boolean or not of four dimensions.
        """
        if mask.dtype != torch.bool or mask.dim() != 4:
            raise InvalidType(
                f"Pattern.mask needs a boolean [B|1, H|1, Nq, Nk] tensor, got {mask.dtype} of "
                f"shape {tuple(mask.shape)}; compare your scores with a threshold first"
            )
        return Mask(mask.shape[-2], mask.shape[-1], mask)

    @staticmethod
    def top(scores: Tensor, k: Budget) -> Pattern:
        """Keep the ``ceil(k * Nk)`` best-scored keys of every row, or ``k`` if it is a count.

        Inside a model the core applies the user's options: prefix columns, tiles (the rows of a
        tile are averaged if there is one per query), background.

        Args:
            scores: ``[B|1, H|1, R, Nk]`` with one row per query, per patch query (prefix left
                out), or per query tile. Where ``inputs.blocks`` is not None there may be one
                column per block of patch keys instead of one per key.
            k: The budget.

        Raises:
            InvalidType: The scores do not have four dimensions, or ``k`` is no number.
            InvalidOption: ``k`` is out of range.

        >>> scores = torch.tensor([[[[3.0, 1.0, 2.0]]]])
        >>> Pattern.top(scores, 2).to_mask().tolist()
        [[[[True, False, True]]]]
        """
        if scores.dim() != 4:
            raise InvalidType(
                f"Pattern.top needs [B|1, H|1, rows, keys] scores, got shape {tuple(scores.shape)}"
            )
        return Ranked(scores.shape[-2], scores.shape[-1], scores=scores, k=check_budget(k))

    @staticmethod
    def computed_keys(
        inputs: AttentionInputs,
        k: Tensor,
        v: Tensor,
        *,
        q: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Pattern:
        """Patch queries attend to computed keys only; prefix queries stay dense.

        ``inputs.scale`` still applies. Set ``selects_keys = False`` on the strategy.

        Args:
            inputs: The operands of the call.
            k: The computed keys, ``[B, H, M, D']``.
            v: Their values, ``[B, H, M, Dv]``.
            q: ``[B, H, n, D']``, replaces the n patch queries if their width changes.
            bias: Float or boolean, ``[B|1, H|1, n|1, M]``, replaces the host's bias.

        Raises:
            InvalidOption: A shape does not fit.

        >>> from sparsiattn.testing.hosts import random_inputs
        >>> inputs = random_inputs((4, 4), prefix=1, dim=8)
        >>> mean = inputs.k.mean(-2, keepdim=True), inputs.v.mean(-2, keepdim=True)
        >>> Pattern.computed_keys(inputs, *mean).pairs()  # the prefix row sees 17 keys, 16 rows one
        33.0
        """
        lead, rows = inputs.q.shape[:2], inputs.n_queries - inputs.prefix
        dim = (inputs.q if q is None else q).shape[-1]
        inputs.require_shape("k", k, (*lead, "M", dim))
        inputs.require_shape("v", v, (*lead, k.shape[-2], inputs.v.shape[-1]))
        if q is not None:
            inputs.require_shape("q", q, (*lead, rows, "D'"))
        if bias is not None:
            inputs.require_broadcast("bias", bias, (*lead, rows, k.shape[-2]))
        return Computed(inputs.n_queries, inputs.n_keys, k, v, q, bias, inputs.prefix)

    @staticmethod
    def logits(inputs: AttentionInputs, logits: Tensor) -> Pattern:
        """Attention with the planner's own logits instead of QK^T.

        The host's bias is added to them. Set ``selects_keys = False`` on the strategy.

        Args:
            inputs: The operands of the call.
            logits: ``[B|1, H|1, Nq, Nk]``.

        Raises:
            InvalidOption: The shape does not fit.
        """
        shape = (*inputs.q.shape[:2], inputs.n_queries, inputs.n_keys)
        inputs.require_broadcast("logits", logits, shape)
        inputs.require_shape("logits", logits, ("B|1", "H|1", *shape[2:]))
        return Logits(inputs.n_queries, inputs.n_keys, logits)

    @staticmethod
    def output(inputs: AttentionInputs, value: Tensor) -> Pattern:
        """Use ``value`` as the result of attention; nothing else is computed.

        Set ``selects_keys = False`` on the strategy.

        Args:
            inputs: The operands of the call.
            value: ``[B, H, Nq, Dv]``.

        Raises:
            InvalidOption: The shape does not fit.
        """
        inputs.require_shape("value", value, (*inputs.q.shape[:3], inputs.v.shape[-1]))
        return Output(inputs.n_queries, inputs.n_keys, value)


@dataclass(frozen=True, eq=False)
class SizedPattern(Pattern):
    """Base of the built-in patterns, with their common fields."""

    n_queries: int
    n_keys: int
    summary: Summary | None = field(default=None, kw_only=True)


@dataclass(frozen=True, eq=False)
class Dense(SizedPattern):
    """Every pair survives."""

    def attend(self, inputs: AttentionInputs) -> Tensor:
        return inputs.masked_attention()


@dataclass(frozen=True, eq=False)
class Ranked(SizedPattern):
    """Scores and how many of the best keys to keep.

    Attributes:
        scores: ``[B|1, H|1, R, Nk]``.
        k: The budget.
        best: Blocks of every row, best first, ``[B|1, H|1, R, C]``, where columns are blocks and
            the planner has ranked them already; else None.
    """

    scores: Tensor
    k: Budget
    best: Tensor | None = None

    def select(self) -> Tensor:
        """Indices of the kept keys, ``[B|1, H|1, R, K]``, unsorted."""
        return self.scores.topk(count_of(self.k, self.n_keys), dim=-1, sorted=False).indices

    def to_mask(self) -> Tensor:
        return scatter_true(self.select(), self.n_keys)

    def pairs(self) -> float:
        return float(self.n_queries * count_of(self.k, self.n_keys))


@dataclass(frozen=True, eq=False)
class Mask(SizedPattern):
    """A boolean mask.

    Attributes:
        n_queries: Number of queries, prefix included.
        n_keys: Number of keys, prefix included.
        keep: ``[B|1, H|1, Nq, Nk]``, True where the pair survives.
        summary: Pooled keys that stand for the dropped ones; None if there are none.

    >>> Mask(4, 4, torch.ones(1, 1, 4, 4).tril().bool()).pairs()
    10.0
    """

    keep: Tensor

    def to_mask(self) -> Tensor:
        return self.keep

    def with_prefix(self, prefix: int, *, keys: bool) -> Mask:
        """The mask with all keys kept for prefix queries, and prefix keys kept for all queries.

        Args:
            prefix: Number of prefix tokens.
            keys: Whether prefix keys are kept for all queries; if False, only the rows of prefix
                queries change.
        """
        row = torch.arange(self.n_queries, device=self.keep.device)[:, None] < prefix
        column = torch.arange(self.n_keys, device=self.keep.device) < (prefix if keys else 0)
        return Mask(self.n_queries, self.n_keys, self.keep | row | column)

    def pairs(self) -> float | None:
        if self.keep.device.type == "meta":  # a dry run has no values to count
            return None
        extra = self.summary.count * self.n_queries if self.summary else 0
        return float(self.keep.float().mean()) * self.n_queries * self.n_keys + extra


class ComputedPattern(SizedPattern):
    """Base of patterns that do not apply the host's own weights to the host's own keys.

    No pair is dropped, so `to_mask` is True everywhere; the savings show in `macs`.
    """

    def macs(self, dim: int, value_dim: int) -> float:
        raise NotImplementedError

    def attend(self, inputs: AttentionInputs) -> Tensor:
        return self.attend_with(inputs, AttentionInputs.masked_attention)

    def attend_with(self, inputs: AttentionInputs, dense: DenseAttention) -> Tensor:
        """The result, ``[B, H, Nq, Dv]``.

        Args:
            inputs: The operands of the call.
            dense: The kernel's dense attention.
        """
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class Computed(ComputedPattern):
    """Patch queries attend to computed keys and values, prefix queries to the host's own.

    Attributes:
        k: ``[B, H, M, D']``.
        v: ``[B, H, M, Dv]``.
        q: ``[B, H, n, D']``; None for the host's.
        bias: ``[B|1, H|1, n|1, M]``, as in `AttentionInputs`.
        dense_rows: Number of prefix queries.
    """

    k: Tensor
    v: Tensor
    q: Tensor | None = None
    bias: Tensor | None = None
    dense_rows: int = 0

    def pairs(self) -> float:
        rows = self.n_queries - self.dense_rows
        return float(self.dense_rows * self.n_keys + rows * self.k.shape[-2])

    def macs(self, dim: int, value_dim: int) -> float:
        prefix = self.dense_rows * self.n_keys
        return prefix * (dim + value_dim) + (self.pairs() - prefix) * (self.k.shape[-1] + value_dim)

    def attend_with(self, inputs: AttentionInputs, dense: DenseAttention) -> Tensor:
        q = inputs.patch_queries if self.q is None else self.q.to(inputs.q.dtype)
        k, v = self.k.to(inputs.k.dtype), self.v.to(inputs.v.dtype)
        rows = dense(inputs.replace(q=q, k=k, v=v, bias=self.bias))
        if not self.dense_rows:
            return rows
        bias = inputs.bias
        if bias is not None and bias.shape[-2] > 1:
            bias = bias[..., : self.dense_rows, :]
        prefix = dense(inputs.replace(q=inputs.q[..., : self.dense_rows, :], bias=bias))
        return torch.cat([prefix, rows], dim=-2)


@dataclass(frozen=True, eq=False)
class Logits(ComputedPattern):
    """Attention weights from the planner's logits, applied to the host's values.

    Attributes:
        values: The logits, ``[B|1, H|1, Nq, Nk]``.
    """

    values: Tensor

    def macs(self, dim: int, value_dim: int) -> float:
        return float(self.n_queries * self.n_keys * value_dim)

    def attend_with(self, inputs: AttentionInputs, dense: DenseAttention) -> Tensor:
        # as in `products`: large logits overflow float16
        dtype = torch.promote_types(inputs.v.dtype, torch.float32)
        logits = inputs.biased(self.values.to(dtype))
        dead = (logits == float("-inf")).all(-1, keepdim=True)
        weights = logits.masked_fill(dead, 0.0).softmax(-1).masked_fill(dead, 0.0)
        if inputs.dropout:
            weights = F.dropout(weights, inputs.dropout)
        return (weights.to(inputs.v.dtype) @ inputs.v).expand(*inputs.q.shape[:-1], -1)


@dataclass(frozen=True, eq=False)
class Output(ComputedPattern):
    """The result of attention, given by the planner.

    Attributes:
        value: ``[B, H, Nq, Dv]``.
    """

    value: Tensor

    def pairs(self) -> float:
        return 0.0

    def macs(self, dim: int, value_dim: int) -> float:
        return 0.0

    def attend_with(self, inputs: AttentionInputs, dense: DenseAttention) -> Tensor:
        return self.value.to(inputs.q.dtype)


def scatter_true(index: Tensor, n_keys: int) -> Tensor:
    """Indices ``[..., R, K]`` to a boolean ``[..., R, n_keys]``."""
    rows = torch.zeros(*index.shape[:-1], n_keys, dtype=torch.bool, device=index.device)
    return rows.scatter(-1, index, 1)  # torch.jit.trace cannot record True
