"""Masked scaled-dot-product attention: computes every pair, so it never saves time."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsiattn.attention.derived import ComputedPattern, Logits
from sparsiattn.attention.patterns import Dense, KeyBlocks, KeyLists, Lengths, Mask, Pattern
from sparsiattn.attention.site import AttentionInputs
from sparsiattn.kernels.base import Kernel, attention_mask
from sparsiattn.kernels.cost import Call, Work
from sparsiattn.runtime.sdpa_intercept import dense_attention


class MaskedSDPA(Kernel):
    """torch's fused attention under the pattern's mask: trains everywhere, saves nothing."""

    name = "sdpa"
    summary = "torch's attention under a mask (trains everywhere, saves no time)"
    supports_computed = True

    def why_not(self, inputs: AttentionInputs, pattern: Pattern) -> list[str]:
        if pattern.summary is not None and pattern.summary.per_query:
            return ["background keys differ between queries under this host mask"]
        return []

    def work(self, inputs: AttentionInputs, pattern: Pattern) -> Work:
        call = Call.of(inputs)
        if isinstance(pattern, ComputedPattern):
            return derived_work(call, pattern)
        if isinstance(pattern, Lengths) and inputs.bias is None:
            return lengths_work(call, pattern, calls=6.0 * len(set(pattern.lengths)))
        keys = call.keys + (pattern.summary.count if pattern.summary else 0)
        pairs = call.queries * keys
        if isinstance(pattern, Dense):
            return call.attending(pairs)
        masks = 1 if isinstance(pattern, Lengths) else _masks(call, pattern)
        # a boolean mask, spread over tiles, then one of logits
        moved = masks * pairs * (2 + 3 * call.dtype.itemsize)
        return call.attending(pairs, calls=20.0, moved=moved)

    def __call__(self, inputs: AttentionInputs, pattern: Pattern) -> Tensor:
        if isinstance(pattern, Lengths) and inputs.bias is None:
            return by_length(inputs, pattern.lengths)
        if isinstance(pattern, ComputedPattern):
            return pattern.attend(inputs, self._every_key)
        q, k, v = inputs.q, inputs.k, inputs.v
        if isinstance(pattern, Dense) and inputs.allowed() is None:
            mask, dead = inputs.bias, None
        else:
            mask, dead = attention_mask(inputs, pattern)
        if pattern.summary is not None:
            k, v = (torch.cat([x, pattern.summary.pool(x)], dim=-2) for x in (k, v))
        if mask is not None and mask.dtype != torch.bool:
            mask = mask.to(q.dtype)
        out = dense_attention(q, k, v, mask, inputs.dropout, scale=inputs.scale)
        return out if dead is None else out.masked_fill(dead, 0.0)

    def _every_key(self, inputs: AttentionInputs) -> Tensor:
        return self(inputs, Dense(inputs.n_queries, inputs.n_keys))


def _masks(call: Call, pattern: Pattern) -> int:
    """Over how many images and heads the pattern's mask differs."""
    if isinstance(pattern, KeyBlocks):
        lead = pattern.chosen.shape[:2]
    elif isinstance(pattern, KeyLists):
        lead = pattern.index.shape[:2]
    else:
        lead = pattern.keep.shape[:2] if isinstance(pattern, Mask) else torch.Size((1, 1))
    return (1 if lead[0] == 1 else call.batch) * lead[1]


def derived_work(call: Call, pattern: ComputedPattern) -> Work:
    """Of a plan that chooses no keys: its operands are there, so only attention is left."""
    each = call.batch * call.heads
    pairs, macs = pattern.pairs() or 0.0, pattern.macs(call.dim, call.value_dim)
    by_hand = isinstance(pattern, Logits)  # writes its matrix of weights
    moved = each * pairs * 4 * 3 if by_hand else 0.0
    calls = 8.0 if by_hand else 4.0 if pairs else 1.0
    return Work(calls, each * macs, each * pairs, moved, each * call.queries if pairs else 0.0)


def lengths_work(call: Call, pattern: Lengths, calls: float) -> Work:
    """Attention of packed images, each for itself."""
    return call.attending(sum(n * n for n in pattern.lengths), calls=calls)


def by_length(inputs: AttentionInputs, lengths: tuple[int, ...]) -> Tensor:
    """Dense attention of packed images: one call for all images of one length, no padding."""
    ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    out: dict[int, Tensor] = {}
    for n in sorted(set(lengths)):
        same = [i for i, length in enumerate(lengths) if length == n]
        q, k, v = (
            torch.cat([x[:, :, ends[i] - n : ends[i]] for i in same])
            for x in (inputs.q, inputs.k, inputs.v)
        )
        rows = dense_attention(q, k, v, None, inputs.dropout, scale=inputs.scale)
        batch = inputs.q.shape[0]
        out.update(zip(same, rows.split(batch), strict=True))
    return torch.cat([out[i] for i in range(len(lengths))], dim=2)
