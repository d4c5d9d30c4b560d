"""Small hosts of many shapes, made once each."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from timm.models import SwinTransformer, VisionTransformer
from torch import Tensor, nn

DTYPES = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
PATCH = 4


@dataclass(frozen=True)
class Host:
    """A timm model: its grid of patches, blocks, heads, width of a head and prefix tokens."""

    family: str = "vit"
    grid: tuple[int, int] = (4, 4)
    depth: int = 2
    heads: int = 2
    width: int = 8
    prefix: int = 1

    @property
    def size(self) -> tuple[int, int]:
        return self.grid[0] * PATCH, self.grid[1] * PATCH


@lru_cache(maxsize=64)
def build(host: Host, dtype: str = "fp32") -> nn.Module:
    """In eval mode, weights drawn so that every branch matters. Callers leave it as it is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = _swin(host) if host.family == "swin" else _vit(host)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3 if parameter.dim() == 1 else 0.15)
    if host.family == "unfused":
        for module in model.modules():
            if hasattr(module, "fused_attn"):
                setattr(module, "fused_attn", False)  # noqa: B010
    return model.eval().to(DTYPES[dtype])


def _vit(host: Host) -> nn.Module:
    model: nn.Module = VisionTransformer(
        img_size=host.size, patch_size=PATCH, embed_dim=host.heads * host.width, depth=host.depth,
        num_heads=host.heads, num_classes=3, mlp_ratio=2, class_token=host.prefix > 0,
        reg_tokens=max(0, host.prefix - 1), global_pool="avg", qk_norm=host.family == "unfused",
    )  # fmt: skip
    return model


def _swin(host: Host) -> nn.Module:
    """Windows of 2 x 2 tokens, the second block's shifted under a mask."""
    model: nn.Module = SwinTransformer(
        img_size=16, patch_size=PATCH, window_size=2, embed_dim=host.heads * host.width,
        depths=(host.depth,), num_heads=(host.heads,), num_classes=3, mlp_ratio=2,
    )  # fmt: skip
    return model


def hooks_on(model: nn.Module) -> int:
    """Forward hooks of all modules."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit, NaN equal to NaN."""
    return (
        a.shape == b.shape and a.dtype == b.dtype and bool(((a == b) | (a != a) & (b != b)).all())
    )
