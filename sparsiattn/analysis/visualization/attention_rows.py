"""Attention of some queries, recomputed from a site's inputs: exact, and under a pattern.

Never all rows of all heads at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsiattn.attention import AttentionInputs, Dense, KeyLists, Pattern
from sparsiattn.attention.pattern import scatter_true

CHUNK = 1 << 22
"""Logits computed at a time: 16 MiB of float32."""


@dataclass(frozen=True, eq=False)
class Rows:
    """Attention of R queries of one call.

    Attributes:
        exact: ``[B, H, R, Nk]``, dense softmax.
        allowed: ``[B, H, R, Nk]`` bool, pairs that the host allows.
        kept: ``[B, H, R, Nk]`` bool, pairs that the pattern computes.
        pattern: ``[B, H, R, Nk]``, softmax over the kept pairs.
        background: ``[B, H, R]``, share of that softmax on pooled keys.
    """

    exact: Tensor
    allowed: Tensor
    kept: Tensor
    pattern: Tensor
    background: Tensor

    def sums(self, first: int) -> Tensor:
        """``[3, H]`` over the queries from ``first`` on: exact attention on kept keys, pairs kept,
        pairs allowed."""
        mass = (self.exact * self.kept).sum(-1)
        by_query = (mass, self.kept.sum(-1).float(), self.allowed.sum(-1).float())
        return torch.stack([values[..., first:].sum((0, 2)).cpu() for values in by_query])


def chunks(inputs: AttentionInputs) -> list[Tensor]:
    """The queries of a call in runs that fit `CHUNK`."""
    per_query = inputs.q.shape[0] * inputs.q.shape[1] * inputs.n_keys
    size = max(1, CHUNK // max(1, per_query))
    return list(torch.arange(inputs.n_queries, device=inputs.q.device).split(size))


def compute(inputs: AttentionInputs, pattern: Pattern, rows: Tensor) -> Rows:
    """Attention of some queries of a call.

    Args:
        inputs: The call, in float32.
        pattern: What the strategy computes of it.
        rows: ``[R]``, numbers of the queries.
    """
    logits = inputs.logits(rows)
    allowed = _allowed_rows(inputs, rows).expand(logits.shape)
    kept = kept_rows(pattern, rows).to(logits.device) & allowed
    kept_logits = logits.masked_fill(~kept, float("-inf"))
    pooled = _pooled_logits(inputs, pattern, rows)
    if pooled is not None:
        kept_logits = torch.cat([kept_logits, pooled], dim=-1)
    weights = _softmax(kept_logits)
    n = inputs.n_keys
    return Rows(_softmax(logits), allowed, kept, weights[..., :n], weights[..., n:].sum(-1))


def kept_rows(pattern: Pattern, rows: Tensor) -> Tensor:
    """Rows of `Pattern.to_mask`, ``[B|1, H|1, R, Nk]``, where possible without the whole mask.

    >>> kept_rows(Dense(4, 3), torch.tensor([2])).tolist()
    [[[[True, True, True]]]]
    """
    if isinstance(pattern, Dense):
        return torch.ones(1, 1, len(rows), pattern.n_keys, dtype=torch.bool, device=rows.device)
    if not isinstance(pattern, KeyLists):
        mask = pattern.to_mask()
        return mask.index_select(-2, rows.to(mask.device))
    lists = (rows - pattern.dense_rows).clamp_min(0)
    if pattern.tiles is not None:
        lists = (pattern.tiles.slot // pattern.tiles.size)[lists]
    listed = scatter_true(pattern.index.index_select(-2, lists), pattern.n_keys)
    return listed | (rows < pattern.dense_rows)[:, None]


def _allowed_rows(inputs: AttentionInputs, rows: Tensor) -> Tensor:
    """Rows of the host's mask, broadcastable to ``[B, H, R, Nk]``; True where it has none."""
    allowed = inputs.allowed()
    if allowed is None:
        return torch.ones((), dtype=torch.bool, device=rows.device)
    return allowed if allowed.shape[-2] == 1 else allowed.index_select(-2, rows)


def _pooled_logits(inputs: AttentionInputs, pattern: Pattern, rows: Tensor) -> Tensor | None:
    """Logits of the background's pooled keys, ``[B, H, R, G]``; None without a background."""
    summary, bias = pattern.summary, pattern.summary_rows()
    if summary is None or bias is None:
        return None
    logits = inputs.replace(bias=None).logits(rows)
    weights = summary.weights(logits.dtype)
    if summary.allowed is None:
        pooled = logits @ weights.mT
    else:
        if summary.per_query:
            weights = weights.index_select(-3, rows)
        pooled = (weights @ logits.unsqueeze(-1)).squeeze(-1)
    return pooled + bias.index_select(-2, rows).to(pooled.dtype)


def _softmax(logits: Tensor) -> Tensor:
    """Softmax whose rows without a single key are zero, where torch's own gives NaN."""
    empty = (logits == float("-inf")).all(-1, keepdim=True)
    return logits.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)
