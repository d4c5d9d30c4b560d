"""A ViT by hand, whose tokens a function reduces."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class PlainViT:
    """A timm ViT by hand, one image at a time; ``reduce(i, x, attention, keys)`` after block i's
    attention returns the new tokens, their sizes and, for each old patch, its new place."""

    def __init__(self, model: Any, proportional: bool = False) -> None:
        self.model, self.proportional = model, proportional
        self.prefix = model.num_prefix_tokens

    def run(self, image: Tensor, reduce: Any) -> tuple[Tensor, list[int], list[float]]:
        model = self.model
        x = model._pos_embed(model.patch_embed(image[None]))[0]
        size = [1.0] * len(x)
        source = list(range(len(x) - self.prefix))
        for index, block in enumerate(model.blocks):
            out, weights, keys = self.attend(block.attn, block.norm1(x), size)
            x = x + block.ls1(out)
            found = reduce(index, x, weights, keys, size)
            if found is not None:
                x, size, place = found
                source = [place[s] if s >= 0 else -1 for s in source]
            x = x + block.ls2(block.mlp(block.norm2(x)))
        return x, source, size

    def attend(self, attn: Any, x: Tensor, size: list[float]) -> tuple[Tensor, Tensor, Tensor]:
        n = len(x)
        q, k, v = attn.qkv(x).reshape(n, 3, attn.num_heads, -1).permute(1, 2, 0, 3)
        logits = q @ k.mT * attn.head_dim**-0.5
        weights = logits.exp()
        if self.proportional:
            weights = weights * torch.tensor(size)
        weights = weights / weights.sum(-1, keepdim=True)
        out = (weights @ v).transpose(0, 1).reshape(n, -1)
        return attn.proj(out), weights, k.mean(0)
