"""Masked scaled-dot-product attention: computes every pair, so it never saves time."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsiattn.interception import dense_attention
from sparsiattn.kernel import Kernel, attention_mask
from sparsiattn.patterns import Dense, Lengths, Pattern
from sparsiattn.site import AttentionInputs


class MaskedSDPA(Kernel):
    """torch's fused attention under the pattern's mask: trains everywhere, saves nothing."""

    name = "sdpa"
    summary = "torch's attention under a mask (trains everywhere, saves no time)"

    def why_not(self, inputs: AttentionInputs, pattern: Pattern) -> list[str]:
        if pattern.summary is not None and pattern.summary.per_query:
            return ["background keys differ between queries under this host mask"]
        return []

    def speed(self, inputs: AttentionInputs, pattern: Pattern) -> float:
        # a mask and its planning cost time and save none: 0.2x to 0.9x was measured
        return 1.0 if isinstance(pattern, (Dense, Lengths)) else 0.5

    def __call__(self, inputs: AttentionInputs, pattern: Pattern) -> Tensor:
        if isinstance(pattern, Lengths) and inputs.bias is None:
            return by_length(inputs, pattern.lengths)
        q, k, v = inputs.q, inputs.k, inputs.v
        if isinstance(pattern, Dense):
            mask, dead = inputs.bias, None
        else:
            mask, dead = attention_mask(inputs, pattern)
        if pattern.summary is not None:
            k, v = (torch.cat([x, pattern.summary.pool(x)], dim=-2) for x in (k, v))
        if mask is not None and mask.dtype != torch.bool:
            mask = mask.to(q.dtype)
        out = dense_attention(q, k, v, mask, inputs.dropout, scale=inputs.scale)
        return out if dead is None else out.masked_fill(dead, 0.0)


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
