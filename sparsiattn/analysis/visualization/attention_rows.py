"""Attention of some queries, computed anew from what a site handed over: exact, and as a pattern
leaves it. Never all rows of all heads at once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsiattn.attention.inputs import AttentionInputs
from sparsiattn.attention.key_lists import KeyLists
from sparsiattn.attention.pattern import Dense, Pattern, scatter_true

CHUNK = 1 << 22
"""Logits computed at a time: 16 MiB of float32."""


@dataclass(frozen=True, eq=False)
class Rows:
    """Attention of queries, ``[B, H, R, Nk]`` each.

    exact: dense softmax. kept: whether the pattern computes the pair. pattern: the softmax over
    what it keeps. background: ``[B, H, R]``, the share that pooled keys take of it.
    """

    exact: Tensor
    kept: Tensor
    pattern: Tensor
    background: Tensor

    @property
    def mass(self) -> Tensor:
        """``[B, H, R]``: the share of exact attention on kept keys."""
        return (self.exact * self.kept).sum(-1)


def chunks(inputs: AttentionInputs) -> list[Tensor]:
    """The queries of a call in runs that fit `CHUNK`."""
    per_query = inputs.q.shape[0] * inputs.q.shape[1] * inputs.n_keys
    size = max(1, CHUNK // max(1, per_query))
    return list(torch.arange(inputs.n_queries, device=inputs.q.device).split(size))


def compute(inputs: AttentionInputs, pattern: Pattern, rows: Tensor) -> Rows:
    """Attention of the queries ``rows`` ``[R]`` of a call; inputs in float32."""
    logits = inputs.logits(rows)
    kept = kept_rows(pattern, rows).to(logits.device)
    allowed = inputs.allowed()
    if allowed is not None:
        kept = kept & (allowed if allowed.shape[-2] == 1 else allowed.index_select(-2, rows))
    kept = kept.expand(logits.shape)
    left = logits.masked_fill(~kept, float("-inf"))
    pooled = _pooled(inputs, pattern, rows)
    if pooled is not None:
        left = torch.cat([left, pooled], dim=-1)
    weights = _softmax(left)
    n = inputs.n_keys
    return Rows(_softmax(logits), kept, weights[..., :n], weights[..., n:].sum(-1))


def kept_rows(pattern: Pattern, rows: Tensor) -> Tensor:
    """Rows of `Pattern.to_mask`, ``[B|1, H|1, R, Nk]``, without making all of it where that can be
    avoided.

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
    chosen = scatter_true(pattern.index.index_select(-2, lists), pattern.n_keys)
    return chosen | (rows < pattern.dense_rows)[:, None]


def _pooled(inputs: AttentionInputs, pattern: Pattern, rows: Tensor) -> Tensor | None:
    """Logits of the background's pooled keys, ``[B, H, R, G]``."""
    summary, bias = pattern.summary, pattern.summary_rows()
    if summary is None or bias is None:
        return None
    products = inputs.replace(bias=None).logits(rows)
    weights = summary.weights(products.dtype)
    if summary.allowed is None:
        pooled = products @ weights.mT
    else:
        if summary.per_query:
            weights = weights.index_select(-3, rows)
        pooled = (weights @ products.unsqueeze(-1)).squeeze(-1)
    return pooled + bias.index_select(-2, rows).to(pooled.dtype)


def _softmax(logits: Tensor) -> Tensor:
    """Softmax whose rows without a single key are zero."""
    dead = (logits == float("-inf")).all(-1, keepdim=True)
    return logits.masked_fill(dead, 0.0).softmax(-1).masked_fill(dead, 0.0)
