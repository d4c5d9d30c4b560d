"""Sparse attention without the library: a masked softmax in the place of torch's own attention."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def strongest(scores: Tensor, share: float) -> Tensor:
    """Whether each key is among that share (or count) of a query's strongest, ``[..., N, N]``."""
    count = share if isinstance(share, int) else round(share * scores.shape[-1])
    weakest = scores.topk(count, dim=-1).values[..., -1:]
    return scores >= weakest


@contextmanager
def strongest_keys(share: float, prefix: int = 0) -> Iterator[None]:
    """Inside the block every patch attends to that share (or count) of keys, the strongest ones."""

    def attention(q: Tensor, k: Tensor, v: Tensor, *_: Any, **options: Any) -> Tensor:
        scale = options.get("scale") or q.shape[-1] ** -0.5
        scores = q @ k.mT * scale
        kept = strongest(scores, share)
        kept[..., :prefix, :] = True
        return scores.masked_fill(~kept, float("-inf")).softmax(-1) @ v

    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # encoders of torch would not call it
    try:
        with mock.patch.object(F, "scaled_dot_product_attention", attention):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


class TokenAttention(nn.Module):
    """Attention between tokens ``[B, N, 48]`` in three heads, by whatever function it is given."""

    num_heads = 3

    def __init__(self, attend: Any) -> None:
        super().__init__()
        self.qkv, self.attend = nn.Linear(48, 144), attend

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, 3, 16).permute(2, 0, 3, 1, 4)
        return self.attend(self, q, k, v).transpose(1, 2).reshape(batch, tokens, width)


class Blocks(nn.Module):
    """A patch embedding of images 64 x 64 and residual blocks of one layer each."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.patch_embed, self.blocks = nn.Conv2d(3, 48, 8, 8), nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x).flatten(2).mT
        for block in self.blocks:
            x = x + block(x)
        return x


SIZE = (1, 3, 64, 64)


def photos(batch: int = 2) -> Tensor:
    return torch.randn(batch, *SIZE[1:], generator=torch.Generator().manual_seed(3))
