"""Logits of attention: scaled products of queries and keys, and the host's bias on top."""

from __future__ import annotations

import torch
from torch import Tensor


def products(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """``q @ k.mT * scale``; float16 operands give float32, as large logits overflow float16."""
    if q.dtype == torch.float16:
        return (q.float() * scale) @ k.float().mT
    return q @ k.mT * scale


def add_bias(logits: Tensor, bias: Tensor | None) -> Tensor:
    """Logits with an additive or boolean mask; forbidden keys at -inf."""
    if bias is None:
        return logits
    if bias.dtype == torch.bool:
        return logits.masked_fill(~bias, float("-inf"))
    return logits + bias.to(logits.dtype)
