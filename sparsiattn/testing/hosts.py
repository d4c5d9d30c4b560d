"""Small hosts and inputs for the suites."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from sparsiattn.attention import AttentionInputs, Site


def tiny_vit(**options: Any) -> nn.Module:
    """A two-block timm ViT, 64 patches and a CLS token, in eval mode.

    Args:
        **options: Of timm's `VisionTransformer`.
    """
    from timm.models import VisionTransformer

    options = {"embed_dim": 48, "depth": 2, "num_heads": 3, "init_values": 1.0, **options}
    return _with_random_weights(VisionTransformer, **options)


def windowed_vit() -> nn.Module:
    """Two blocks of a Swin, the second with shifted windows of 4 x 4 tokens, in eval mode."""
    from timm.models import SwinTransformer

    options = {"window_size": 4, "embed_dim": 24, "depths": (2,), "num_heads": (2,)}
    return _with_random_weights(SwinTransformer, **options)


def _with_random_weights(kind: Callable[..., nn.Module], **options: Any) -> nn.Module:
    """The same weights at every call, large enough for attention to matter."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = kind(**{"img_size": 32, "patch_size": 4, "num_classes": 5, **options})
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3 if parameter.dim() == 1 else 0.15)
    return model.eval()


class _OwnBlock(nn.Module):
    """Pre-norm attention and MLP, 16 wide with 2 heads."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)
        self.mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        out = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.proj(out.transpose(1, 2).flatten(2))
        return cast(Tensor, x + self.mlp(self.norm2(x)))


class _OwnViT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pretrained_cfg = {"input_size": (3, 32, 32)}
        self.embed = nn.Conv2d(3, 16, 8, 8)
        self.blocks = nn.Sequential(_OwnBlock(), _OwnBlock())
        self.head = nn.Linear(16, 5)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.embed(images).flatten(2).transpose(1, 2)
        return cast(Tensor, self.head(self.blocks(tokens).mean(1)))


def own_vit() -> nn.Module:
    """A ViT of nobody's family: 16 patches, two blocks, no class token, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return _OwnViT().eval()


def windowed_images(batch: int = 2) -> Tensor:
    """Fixed random images ``[B, 3, 32, 32]`` for `windowed_vit`."""
    return tiny_images(batch)


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
    """Inputs of one self-attention call over a token grid; sharp enough that choices matter.

    Args:
        grid: Rows and columns of patch tokens.
        batch: Images, B.
        heads: Heads, H.
        dim: Width of queries and keys per head, D.
        value_dim: Width of values; as ``dim`` if None.
        prefix: Leading tokens that are no patches.
        tile: Queries that share their keys, rows and columns.
        block: Keys that are kept together, rows and columns.
        bias: The host's additive bias or boolean mask.
        kind: What `Site.bias` says of it.
        dtype: Of queries, keys and values.
        seed: Of the values.

    Returns:
        Queries and keys ``[B, H, N, D]``, values ``[B, H, N, value_dim]``.
    """
    generator = torch.Generator().manual_seed(seed)
    n = grid[0] * grid[1] + prefix

    def draw(width: int) -> Tensor:
        return (2 * torch.randn(batch, heads, n, width, generator=generator)).to(dtype)

    q, k, v = draw(dim), draw(dim), draw(value_dim or dim)
    site = Site.of(q, k, v, prefix_tokens=prefix, grid=grid, key_grid=grid, bias=kind)
    return AttentionInputs(q, k, v, dim**-0.5, bias, site, tile=tile, block=block)
