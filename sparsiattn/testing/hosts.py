"""Small models and inputs for the suites."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from sparsiattn.attention import AttentionInputs, Site


def tiny_vit(**options: Any) -> nn.Module:
    """A timm ViT in eval mode with two blocks, 64 patches and a class token.

    Args:
        **options: Options of timm's `VisionTransformer`.

    >>> tiny_vit(num_classes=3)(tiny_images(2)).shape
    torch.Size([2, 3])
    """
    from timm.models import VisionTransformer

    options = {"embed_dim": 48, "depth": 2, "num_heads": 3, "init_values": 1.0, **options}
    return _with_random_weights(VisionTransformer, **options)


def windowed_vit() -> nn.Module:
    """A Swin in eval mode with two blocks; the second has shifted windows of 4 x 4 tokens.

    >>> windowed_vit()(windowed_images(2)).shape
    torch.Size([2, 5])
    """
    from timm.models import SwinTransformer

    options = {"window_size": 4, "embed_dim": 24, "depths": (2,), "num_heads": (2,)}
    return _with_random_weights(SwinTransformer, **options)


def _with_random_weights(kind: Callable[..., nn.Module], **options: Any) -> nn.Module:
    """Create a model with fixed random weights, large enough for attention to matter."""
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
    """A ViT in eval mode that no library has: 16 patches, two blocks, no class token."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return _OwnViT().eval()


def windowed_images(batch: int = 2) -> Tensor:
    """Fixed random images ``[B, 3, 32, 32]`` for `windowed_vit`."""
    return tiny_images(batch)


def tiny_images(batch: int = 3) -> Tensor:
    """Fixed random images ``[B, 3, 32, 32]``.

    >>> tiny_images(2).shape
    torch.Size([2, 3, 32, 32])
    """
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
    """Random inputs of one self-attention call over a token grid.

    Attention is peaked enough that the selection of keys matters.

    Args:
        grid: Rows and columns of patch tokens.
        batch: Number of images, B.
        heads: Number of heads, H.
        dim: Channels of queries and keys per head, D.
        value_dim: Channels of values; None for ``dim``.
        prefix: Number of leading tokens that are not patches.
        tile: Rows and columns of queries that share their keys.
        block: Rows and columns of keys that are kept together.
        bias: The host's additive bias or boolean mask.
        kind: Kind of the bias, as in `Site.bias`.
        dtype: Data type of queries, keys and values.
        seed: Seed of the random values.

    Returns:
        Queries and keys ``[B, H, N, D]``, values ``[B, H, N, value_dim]``.

    >>> inputs = random_inputs((4, 5), prefix=1, value_dim=6)
    >>> inputs.q.shape, inputs.v.shape
    (torch.Size([2, 3, 21, 8]), torch.Size([2, 3, 21, 6]))
    """
    generator = torch.Generator().manual_seed(seed)
    n = grid[0] * grid[1] + prefix

    def draw(width: int) -> Tensor:
        return (2 * torch.randn(batch, heads, n, width, generator=generator)).to(dtype)

    q, k, v = draw(dim), draw(dim), draw(value_dim or dim)
    site = Site.of(q, k, v, prefix_tokens=prefix, grid=grid, key_grid=grid, bias=kind)
    return AttentionInputs(q, k, v, dim**-0.5, bias, site, tile=tile, block=block)
