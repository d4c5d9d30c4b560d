"""A small Vision Transformer whose sequence is put together as a test wants it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn


class SequenceViT(nn.Module):
    """Patches of one image or several views, with special tokens anywhere, in any order.

    Args:
        size: Rows and columns of a view in pixels; patches are of 4 x 4.
        prefix: Special tokens before the patches.
        suffix: Special tokens behind them.
        specials: Special tokens at the start of every view.
        order: The patches that the sequence holds, by their raster numbers; None for all.
    """

    def __init__(
        self,
        size: tuple[int, int] = (32, 32),
        *,
        prefix: int = 1,
        suffix: int = 0,
        specials: int = 0,
        order: Sequence[int] | None = None,
        depth: int = 3,
    ) -> None:
        super().__init__()
        self.size, self.counts, self.order = size, (prefix, suffix, specials), order
        self.proj = nn.Conv2d(3, 48, 4, 4)
        self.extra = nn.Parameter(torch.randn(1, prefix + suffix + specials, 48))
        self.blocks = nn.ModuleList(Block(48, 3) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(48), nn.Linear(48, 5)

    def sequence(self, image: Tensor) -> Tensor:
        """Tokens of ``[B, 3, H, W]`` or ``[B, views, 3, H, W]``."""
        prefix, suffix, specials = self.counts
        views = image.shape[1] if image.dim() == 5 else 1
        x = self.proj(image.flatten(0, 1) if image.dim() == 5 else image).flatten(2).mT
        if self.order is not None:
            x = x[:, torch.tensor(self.order, device="cpu")]
        first, last, every = self.extra.split((prefix, suffix, specials), dim=1)
        x = torch.cat([every.expand(len(x), -1, -1), x], dim=1)
        x = x.reshape(len(x) // views, -1, 48)
        ends = [part.expand(len(x), -1, -1) for part in (first, last)]
        return torch.cat([ends[0], x, ends[1]], dim=1)

    def forward(self, image: Tensor) -> Any:
        x = self.sequence(image)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


def drawn(model: nn.Module, seed: int = 0) -> Any:
    """The model in eval mode, its weights random enough that attention is not even."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval()
