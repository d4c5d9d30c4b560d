"""Patterns: which (query, key) pairs survive, as tensors.

A planner returns `Dense`, `Mask`, `Ranked` or a `ComputedPattern`. `Ranked` holds scores and a
budget; the core turns it into key lists (`sparsiattn.attention.key_lists`) once prefix tokens,
tiles and the host's masks are taken into account. The others are what kernels compute, and so is
`Lengths`, the pattern of images with different numbers of tokens.
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
from sparsiattn.attention.sdpa import differentiable_attention
from sparsiattn.errors import InvalidType, RenamedMembers

DenseAttention = Callable[[AttentionInputs], Tensor]


class Pattern(RenamedMembers):
    """Which of ``n_queries`` x ``n_keys`` pairs survive, and what stands for the others.

    Planners make one with `dense`, `mask`, `top`, `computed_keys`, `logits` or `output`.

    Attributes:
        n_queries: Queries, prefix included; of `Ranked`, rows of scores: one per query, per patch
            query or per tile.
        n_keys: Keys, prefix included; of `Ranked`, columns of scores.
        summary: Pooled keys that stand for the dropped ones; None without.

    >>> Pattern.top(torch.tensor([[[[0.1, 0.7, 0.2]]]]), 2).to_mask().tolist()
    [[[[False, True, True]]]]
    """

    renamed_members: ClassVar[Mapping[str, str]] = {"over": "computed_keys"}

    n_queries: int
    n_keys: int
    summary: Summary | None = None

    def to_mask(self) -> Tensor:
        """Boolean ``[B|1, H|1, Nq, Nk]``, True where the pair survives; here, everywhere."""
        return torch.ones(1, 1, self.n_queries, self.n_keys, dtype=torch.bool)

    def describe(self) -> Hashable | None:
        """All that a kernel may look at in a pattern of a plug-in: shapes, counts, no values.

        Choices of kernels are kept for calls whose patterns agree in it. Without an override the
        kernels are asked in every call.
        """
        return None

    def pairs(self) -> float | None:
        """Logits computed per head, summary included; None if only the values tell."""
        return float(self.n_queries * self.n_keys)

    def macs(self, dim: int, value_dim: int) -> float | None:
        """QK^T and AV of one head, pooling of the summary keys included; None as in `pairs`."""
        pairs = self.pairs()
        if pairs is None:
            return None
        pooled = 0 if self.summary is None else self.summary.count * self.n_keys
        return (pairs + pooled) * (dim + value_dim)

    def summary_rows(self) -> Tensor | None:
        """The summary's logit for every query, ``[B|1, H|1, Nq, G]``; None without a summary."""
        return None if self.summary is None else self.summary.bias

    def attention_mask(self, inputs: AttentionInputs) -> tuple[Tensor, Tensor | None]:
        """The pattern and the host's mask in one; see `AttentionInputs.attention_mask`."""
        empty = isinstance(self, Mask)
        return inputs.attention_mask(self.to_mask(), self.summary_rows(), rows_can_be_empty=empty)

    def attend(self, inputs: AttentionInputs) -> Tensor:
        """Attention over the surviving pairs by torch's masked attention, ``[B, H, Nq, Dv]``."""
        return inputs.masked_attention(*self.attention_mask(inputs), self.summary)

    @staticmethod
    def dense(n_queries: int, n_keys: int) -> Pattern:
        """Every pair survives."""
        return Dense(n_queries, n_keys)

    @staticmethod
    def mask(mask: Tensor) -> Pattern:
        """The pairs where a boolean ``[B|1, H|1, Nq, Nk]`` is True."""
        if mask.dtype != torch.bool or mask.dim() != 4:
            raise InvalidType(
                f"Pattern.mask needs a boolean [B|1, H|1, Nq, Nk] tensor, got {mask.dtype} of "
                f"shape {tuple(mask.shape)}; compare your scores with a threshold first"
            )
        return Mask(mask.shape[-2], mask.shape[-1], mask)

    @staticmethod
    def top(scores: Tensor, k: Budget) -> Pattern:
        """The ``ceil(k * Nk)`` (or, as a count, ``k``) best-scored keys of every row.

        Inside a model the core adds what the user's options say: prefix columns, tiles (rows are
        averaged where scores came per query), background.

        Args:
            scores: ``[B|1, H|1, R, Nk]`` with one row per query, per patch query (prefix left
                out), or per query tile. Where ``inputs.blocks`` is not None there may be one
                column per block of patch keys instead of one per key.
            k: The budget.

        >>> scores = torch.tensor([[[[3.0, 1.0, 2.0]]]])
        >>> Pattern.top(scores, 2).to_mask().tolist()
        [[[[True, False, True]]]]
        """
        if scores.dim() != 4:
            raise InvalidType(
                f"Pattern.top needs [B|1, H|1, rows, keys] scores, got shape {tuple(scores.shape)}"
            )
        return Ranked(scores.shape[-2], scores.shape[-1], scores, check_budget(k))

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

        ``inputs.scale`` applies as ever. Set ``selects_keys = False`` on the strategy.

        Args:
            inputs: Those of the call.
            k: ``[B, H, M, D']``.
            v: ``[B, H, M, Dv]``.
            q: ``[B, H, n, D']`` in place of the n patch queries, where their width changes.
            bias: Float or boolean, ``[B|1, H|1, n|1, M]``, in place of the host's.

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
        """Attention by logits ``[B|1, H|1, Nq, Nk]`` that are known without QK^T.

        The host's bias is added to them. Set ``selects_keys = False`` on the strategy.

        Raises:
            InvalidOption: The shape does not fit.
        """
        shape = (*inputs.q.shape[:2], inputs.n_queries, inputs.n_keys)
        inputs.require_broadcast("logits", logits, shape)
        inputs.require_shape("logits", logits, ("B|1", "H|1", *shape[2:]))
        return Logits(inputs.n_queries, inputs.n_keys, logits)

    @staticmethod
    def output(inputs: AttentionInputs, value: Tensor) -> Pattern:
        """``value`` ``[B, H, Nq, Dv]`` in place of attention, of which nothing runs.

        Set ``selects_keys = False`` on the strategy.

        Raises:
            InvalidOption: The shape does not fit.
        """
        inputs.require_shape("value", value, (*inputs.q.shape[:3], inputs.v.shape[-1]))
        return Output(inputs.n_queries, inputs.n_keys, value)


@dataclass(frozen=True, eq=False)
class SizedPattern(Pattern):
    """Base of the built-in patterns: the fields that all of them have."""

    n_queries: int
    n_keys: int
    summary: Summary | None = field(default=None, kw_only=True)


@dataclass(frozen=True, eq=False)
class Dense(SizedPattern):
    """Every pair."""

    def attend(self, inputs: AttentionInputs) -> Tensor:
        return inputs.masked_attention()


@dataclass(frozen=True, eq=False)
class Lengths(SizedPattern):
    """Images of different lengths in one sequence: every query sees the keys of its own image.

    Attributes:
        lengths: Tokens of each image; they add up to ``n_queries`` and to ``n_keys``.
    """

    lengths: tuple[int, ...]

    def to_mask(self) -> Tensor:
        counts = torch.tensor(self.lengths)
        image = torch.repeat_interleave(torch.arange(len(counts)), counts)
        return (image[:, None] == image)[None, None]

    def pairs(self) -> float:
        return float(sum(n * n for n in self.lengths))

    def attend(self, inputs: AttentionInputs) -> Tensor:
        if inputs.bias is not None:
            return super().attend(inputs)
        # one call for all images of one length: no padding, and few calls
        operands = [x.split(self.lengths, dim=2) for x in (inputs.q, inputs.k, inputs.v)]
        rows: dict[int, Tensor] = {}
        for length in sorted(set(self.lengths)):
            images = [i for i, other in enumerate(self.lengths) if other == length]
            q, k, v = (torch.cat([parts[i] for i in images]) for parts in operands)
            out = differentiable_attention(q, k, v, None, inputs.dropout, scale=inputs.scale)
            rows.update(zip(images, out.split(inputs.q.shape[0]), strict=True))
        return torch.cat([rows[i] for i in range(len(self.lengths))], dim=2)


@dataclass(frozen=True, eq=False)
class Ranked(SizedPattern):
    """Scores and how many of the best keys to keep.

    Attributes:
        scores: ``[B|1, H|1, R, Nk]``.
        k: The budget.
        best: Where columns are blocks and the planner ranked them already, the places of the best
            of every row, best first, ``[B|1, H|1, R, C]``.
    """

    scores: Tensor
    k: Budget
    best: Tensor | None = None

    def select(self) -> Tensor:
        """Indices of the kept keys, ``[B|1, H|1, R, K]``, in no order."""
        return self.scores.topk(count_of(self.k, self.n_keys), dim=-1, sorted=False).indices

    def to_mask(self) -> Tensor:
        return scatter_true(self.select(), self.n_keys)

    def pairs(self) -> float:
        return float(self.n_queries * count_of(self.k, self.n_keys))


@dataclass(frozen=True, eq=False)
class Mask(SizedPattern):
    """A boolean mask.

    Attributes:
        n_queries: Queries, prefix included.
        n_keys: Keys, prefix included.
        keep: ``[B|1, H|1, Nq, Nk]``, True where the pair survives.
        summary: Pooled keys that stand for the dropped ones; None without.
    """

    keep: Tensor

    def to_mask(self) -> Tensor:
        return self.keep

    def with_prefix(self, prefix: int, *, keys: bool) -> Mask:
        """The mask with everything open to leading queries, and with their keys open to all.

        Args:
            prefix: How many there are.
            keys: Whether the keys are opened too, or the queries alone.
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
    """A result of attention other than the host's own weights over the host's own keys.

    No pair is dropped, so masks are full; what is saved is in `macs`.
    """

    def macs(self, dim: int, value_dim: int) -> float:
        raise NotImplementedError

    def attend(self, inputs: AttentionInputs) -> Tensor:
        return self.attend_with(inputs, AttentionInputs.masked_attention)

    def attend_with(self, inputs: AttentionInputs, dense: DenseAttention) -> Tensor:
        """The result, ``[B, H, Nq, Dv]``.

        Args:
            inputs: Those of the call.
            dense: How the kernel attends to every key of a call.
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
    """Weights from logits that planning gave, ``[B|1, H|1, Nq, Nk]``, on the host's values."""

    values: Tensor

    def macs(self, dim: int, value_dim: int) -> float:
        return float(self.n_queries * self.n_keys * value_dim)

    def attend_with(self, inputs: AttentionInputs, dense: DenseAttention) -> Tensor:
        # as in `products`: large logits are beyond float16
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
    return rows.scatter(-1, index, 1)  # not True, which torch.jit.trace cannot record
