"""Attention of some queries, recomputed from a site's inputs: exact, and under a pattern.

Memory stays bounded: rows are computed in chunks, never for all queries and heads at once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparsiattn.attention.background import CountedSummary
from sparsiattn.attention.inputs import AttentionInputs
from sparsiattn.attention.key_lists import KeyBlocks, KeyLists
from sparsiattn.attention.pattern import Dense, Pattern, scatter_true
from sparsiattn.attention.top_logits import TopKeys
from sparsiattn.strategies.finalize import bias_of_dropped

CHUNK = 1 << 22
"""Number of logits computed at a time: 16 MiB of float32."""


@dataclass(frozen=True, eq=False)
class Rows:
    """Attention of R queries of one call.

    Attributes:
        exact: ``[B, H, R, Nk]``, dense softmax.
        allowed: ``[B, H, R, Nk]`` bool, pairs that the host allows.
        kept: ``[B, H, R, Nk]`` bool, pairs that the pattern computes.
        pattern: ``[B, H, R, Nk]``, softmax over the kept pairs.
        pooled: ``[B, H, R, G]``, share of that softmax on each pooled key; G is 0 without any.
        cells: ``[Nk]``, index of the pooled key that a key belongs to, G if it belongs to none;
            None without pooled keys.
    """

    exact: Tensor
    allowed: Tensor
    kept: Tensor
    pattern: Tensor
    pooled: Tensor
    cells: Tensor | None

    @property
    def background(self) -> Tensor:
        """``[B, H, R]``, share of the pattern's softmax on pooled keys."""
        return self.pooled.sum(-1)

    def mass(self) -> Tensor:
        """``[B, H, R]``, share of exact attention on the keys that are kept individually."""
        return (self.exact * self.kept).sum(-1)

    def overlap(self) -> Tensor:
        """``[B, H, R]``, overlap of exact attention with the pattern's attention.

        It is the sum over keys of the smaller of both weights, where the share of a pooled key is
        spread evenly over the dropped keys that it summarises. Without pooled keys it is `mass`.
        """
        if self.cells is None:
            return self.mass()
        dropped = (self.allowed & ~self.kept).to(self.exact.dtype)
        ids = torch.arange(self.pooled.shape[-1], device=dropped.device)
        is_member = (self.cells[:, None] == ids).to(dropped.dtype)
        share = self.pooled / (dropped @ is_member).clamp_min(1.0)
        spread = self.pattern + (share @ is_member.mT) * dropped
        return torch.minimum(self.exact, spread).sum(-1)

    def sums(self, first: int) -> Tensor:
        """Sums over the queries from ``first`` on, ``[3, H]``.

        The rows are the exact attention on kept keys, the number of kept pairs, and the number of
        allowed pairs.
        """
        by_query = (self.mass(), self.kept.sum(-1).float(), self.allowed.sum(-1).float())
        return torch.stack([values[..., first:].sum((0, 2)).cpu() for values in by_query])


def in_float32(inputs: AttentionInputs) -> AttentionInputs:
    """The call with queries, keys and bias in float32; weights do not need the values."""
    bias = inputs.bias
    if bias is not None and bias.is_floating_point():
        bias = bias.float()
    return inputs.replace(q=inputs.q.float(), k=inputs.k.float(), bias=bias)


def chunks(inputs: AttentionInputs) -> list[Tensor]:
    """Indices of a call's queries, split so that the logits of each part fit `CHUNK`."""
    per_query = inputs.q.shape[0] * inputs.q.shape[1] * inputs.n_keys
    size = max(1, CHUNK // max(1, per_query))
    return list(torch.arange(inputs.n_queries, device=inputs.q.device).split(size))


def compute(inputs: AttentionInputs, pattern: Pattern, rows: Tensor) -> Rows:
    """Attention of some queries of a call.

    Args:
        inputs: The call, in float32.
        pattern: The pairs that the strategy computes.
        rows: ``[R]``, indices of the queries.
    """
    logits = inputs.logits(rows)
    allowed = _allowed_rows(inputs, rows).expand(logits.shape)
    kept = kept_rows(pattern, rows, logits).to(logits.device) & allowed
    kept_logits = logits.masked_fill(~kept, float("-inf"))
    pooled = _pooled_logits(inputs, pattern, rows, kept)
    if pooled is not None:
        kept_logits = torch.cat([kept_logits, pooled], dim=-1)
    weights = _softmax(kept_logits)
    n = inputs.n_keys
    cells = None if pattern.summary is None else pattern.summary.cells
    return Rows(_softmax(logits), allowed, kept, weights[..., :n], weights[..., n:], cells)


def kept_rows(pattern: Pattern, rows: Tensor, logits: Tensor | None = None) -> Tensor:
    """Rows of `Pattern.to_mask`, ``[B|1, H|1, R, Nk]``, if possible without building the full mask.

    Args:
        pattern: The pairs that the strategy computes.
        rows: ``[R]``, indices of the queries.
        logits: ``[B, H, R, Nk]``, logits of these queries. They are needed for a pattern whose
            keys the kernel finds (`TopKeys`).

    >>> kept_rows(Dense(4, 3), torch.tensor([2])).tolist()
    [[[[True, True, True]]]]
    """
    if isinstance(pattern, Dense):
        return torch.ones(1, 1, len(rows), pattern.n_keys, dtype=torch.bool, device=rows.device)
    if not isinstance(pattern, KeyLists):
        mask = pattern.to_mask()
        return mask.index_select(-2, rows.to(mask.device))
    return _listed(pattern, rows, logits) | (rows < pattern.dense_rows)[:, None]


def _listed(pattern: KeyLists, rows: Tensor, logits: Tensor | None) -> Tensor:
    """Keys in the lists of some queries; a prefix query, which has no list, gets the first one."""
    if isinstance(pattern, TopKeys) and logits is not None and "index" not in vars(pattern):
        scores = logits.clone()
        scores[..., : pattern.prefix] = float("inf")  # in every list
        return scatter_true(scores.topk(pattern.keys, dim=-1).indices, pattern.n_keys)
    lists = (rows - pattern.dense_rows).clamp_min(0)
    if pattern.tiles is not None:
        lists = (pattern.tiles.slot // pattern.tiles.size)[lists]
    if isinstance(pattern, KeyBlocks):
        selected = replace(pattern, chosen=pattern.chosen.index_select(-2, lists))
        return scatter_true(selected.index, pattern.n_keys)
    return scatter_true(pattern.index.index_select(-2, lists), pattern.n_keys)


def _allowed_rows(inputs: AttentionInputs, rows: Tensor) -> Tensor:
    """Rows of the host's mask, broadcastable to ``[B, H, R, Nk]``; True where it has none."""
    allowed = inputs.allowed()
    if allowed is None:
        return torch.ones((), dtype=torch.bool, device=rows.device)
    return allowed if allowed.shape[-2] == 1 else allowed.index_select(-2, rows)


def _pooled_logits(
    inputs: AttentionInputs, pattern: Pattern, rows: Tensor, kept: Tensor
) -> Tensor | None:
    """Logits of the background's pooled keys, ``[B, H, R, G]``; None without a background."""
    summary = pattern.summary
    if summary is None:
        return None
    logits = inputs.replace(bias=None).logits(rows)
    weights = summary.weights(logits.dtype)
    if summary.allowed is None:
        pooled = logits @ weights.mT
    else:
        if summary.per_query:
            weights = weights.index_select(-3, rows)
        pooled = (weights @ logits.unsqueeze(-1)).squeeze(-1)
    return pooled + _pooled_bias(inputs, pattern, rows, kept).to(pooled.dtype)


def _pooled_bias(inputs: AttentionInputs, pattern: Pattern, rows: Tensor, kept: Tensor) -> Tensor:
    """Biases of the pooled keys, ``[B|1, H|1, R, G]``; counted for these rows only if possible."""
    summary = pattern.summary
    if not (isinstance(summary, CountedSummary) and summary.counted) or "bias" in vars(summary):
        bias = pattern.summary_rows()
        assert bias is not None
        return bias.index_select(-2, rows)
    bias, allowed = inputs.bias, inputs.allowed()
    if bias is not None and bias.shape[-2] > 1:
        inputs = inputs.replace(bias=bias.index_select(-2, rows))
        allowed = inputs.allowed()
    counted = bias_of_dropped(kept, inputs, allowed, summary.cells, summary.count)
    return counted.masked_fill((rows < inputs.prefix)[:, None], float("-inf"))


def _softmax(logits: Tensor) -> Tensor:
    """Softmax that returns zeros for rows without a key, where torch's returns NaN."""
    empty = (logits == float("-inf")).all(-1, keepdim=True)
    return logits.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)
