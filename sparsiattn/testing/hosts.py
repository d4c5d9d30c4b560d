"""Small hosts and inputs for the suites."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from sparsiattn.site import AttentionInputs, Site


def tiny_vit(**options: object) -> nn.Module:
    """A two-block timm ViT, 64 patches and a CLS token, in eval mode."""
    from timm.models import VisionTransformer

    fixed = {"img_size": 32, "patch_size": 4, "embed_dim": 48, "depth": 2, "num_heads": 3}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = VisionTransformer(**{**fixed, "num_classes": 5, "init_values": 1.0, **options})
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3 if parameter.dim() == 1 else 0.15)
    return cast(nn.Module, model.eval())


def tiny_images(batch: int = 3) -> Tensor:
    """Fixed random images ``[B, 3, 32, 32]``."""
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(2))


def random_inputs(
    grid: tuple[int, int] = (4, 4),
    *,
    batch: int = 2,
    heads: int = 3,
    dim: int = 8,
    value_dim: int | None = None,
    prefix: int = 1,
    tile: int | tuple[int, int] = 1,
    block: int | tuple[int, int] = 1,
    bias: Tensor | None = None,
    kind: str = "none",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> AttentionInputs:
    """Inputs of one self-attention call over a token grid; sharp enough that choices matter."""
    generator = torch.Generator().manual_seed(seed)
    n = grid[0] * grid[1] + prefix

    def draw(width: int) -> Tensor:
        return (2 * torch.randn(batch, heads, n, width, generator=generator)).to(dtype)

    q, k, v = draw(dim), draw(dim), draw(value_dim or dim)
    site = Site.of(q, k, v, prefix_tokens=prefix, grid=grid, key_grid=grid, bias=kind)
    return AttentionInputs(q, k, v, dim**-0.5, bias, site, tile=tile, block=block)
