"""Attention to the few keys that a block-sparse library cannot take, merged with its result.

Prefix and summary keys are in every list, and the end of a list may be a part of a block. They are
a second, small attention. The log-sum-exp of both merges the results (arXiv 2402.05099, section 3).
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsiattn.attention.inputs import AttentionInputs
from sparsiattn.attention.key_lists import KeyBlocks
from sparsiattn.kernels.cost import CallShape
from sparsiattn.kernels.gather import summary_rows


def moved(call: CallShape, extra: int) -> float:
    """Bytes that the second attention and the merge read and write, in float32.

    Args:
        call: The shape of the call.
        extra: Number of keys of the second attention.
    """
    return 16.0 * call.batch * call.heads * call.queries * (extra + call.value_dim)


def attend(
    q: Tensor, inputs: AttentionInputs, pattern: KeyBlocks, last: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention over prefix and summary keys, and over other keys of each tile, in float32.

    Args:
        q: Queries tile by tile, ``[B, H, T, t, D]``.
        inputs: The operands of the call.
        pattern: Its key blocks.
        last: Ids of further patch keys of every tile, ``[B|1, H|1, T, R]``.

    Returns:
        The result ``[B, H, T, t, Dv]`` and its log-sum-exp ``[B, H, T, t]``, minus infinity for
        queries without such a key.
    """
    summary, prefix = pattern.summary, pattern.prefix
    k, v = (_shared(x, pattern) for x in (inputs.k, inputs.v))
    logits = (q.float() @ k.mT) * inputs.scale
    if summary is not None:
        logits[..., prefix:] += summary_rows(pattern, summary)
    if last is None:
        weights, lse = _softmax(logits)
        return weights @ v, lse
    own_k, own_v = (_of_tiles(x[..., prefix:, :], last) for x in (inputs.k, inputs.v))
    own = (q.float() @ own_k.mT) * inputs.scale
    weights, lse = _softmax(torch.cat([logits, own], -1))
    shared, rest = weights.split([logits.shape[-1], own.shape[-1]], -1)
    return shared @ v + rest @ own_v, lse


def merged(out: Tensor, lse: Tensor, extra: Tensor, extra_lse: Tensor) -> Tensor:
    """One softmax over both sets of keys.

    Args:
        out: The library's result, ``[..., Dv]``.
        lse: Its log-sum-exp, ``[...]``.
        extra: The result of `attend`, ``[..., Dv]``.
        extra_lse: Its log-sum-exp, ``[...]``.
    """
    # share of `out` in the sum of both softmaxes: e^lse / (e^lse + e^extra_lse)
    share = torch.sigmoid(lse - extra_lse).unsqueeze(-1)
    return torch.lerp(extra, out.float(), share).to(out.dtype)


def _shared(x: Tensor, pattern: KeyBlocks) -> Tensor:
    """Rows of prefix and summary keys, ``[B, H, 1, P + G, D]``."""
    rows = x[..., : pattern.prefix, :]
    if pattern.summary is not None:
        rows = torch.cat([rows, pattern.summary.pool(x)], -2)
    return rows.float().unsqueeze(2)


def _of_tiles(x: Tensor, ids: Tensor) -> Tensor:
    """Rows ``[B, H, n, D]`` at ids ``[B|1, H|1, T, R]``, as ``[B, H, T, R, D]``."""
    ids = ids.expand(*x.shape[:2], -1, -1)
    rows: Tensor = x.gather(2, ids.flatten(2).unsqueeze(-1).expand(-1, -1, -1, x.shape[-1]))
    rows = rows.unflatten(2, ids.shape[2:])
    return rows.float()


def _softmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Weights and log-sum-exp; rows without a key have some weights and minus infinity."""
    lse = logits.logsumexp(-1)
    dead = (lse == float("-inf")).unsqueeze(-1)
    return logits.masked_fill(dead, 0.0).softmax(-1), lse
