"""Small models of every supported family, made of timm's real classes."""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature

import timm
import torch
from timm import models
from torch import Tensor, nn

import sparsiattn

TINY = {"img_size": 32, "patch_size": 4, "embed_dim": 48, "depth": 2, "num_heads": 3}
TINY |= {"num_classes": 5}


def _vit(**options: object) -> nn.Module:
    return models.VisionTransformer(**{**TINY, **options})


def _created(name: str, **options: object) -> nn.Module:
    return timm.create_model(name, num_classes=5, **options)


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    # averaged tokens, so that logits show what every row of the last block does
    "vit": lambda: _vit(global_pool="avg"),
    "vit_registers": lambda: _vit(reg_tokens=4, init_values=1e-5, no_embed_class=True),
    "vit_map_pool": lambda: _vit(class_token=False, global_pool="map"),
    "vit_parallel": lambda: _vit(block_fn=models.vision_transformer.ParallelScalingBlock),
    "vit_differential": lambda: _vit(attn_layer="diff", num_heads=2),
    "vit_unfused": lambda: _unfused(_vit(qk_norm=True)),
    "vit_relpos": lambda: models.VisionTransformerRelPos(**TINY),
    "deit_distilled": lambda: models.VisionTransformerDistilled(**TINY),
    "dinov3": lambda: _created(
        "vit_small_patch16_dinov3", img_size=128, embed_dim=48, depth=2, num_heads=3
    ),
    "eva_rope": lambda: _created(
        "eva02_tiny_patch14_224", img_size=112, embed_dim=48, depth=2, num_heads=3
    ),
    "beit": lambda: models.Beit(**TINY, use_rel_pos_bias=True),
    "samvit": lambda: models.VisionTransformerSAM(
        **TINY, use_rel_pos=True, window_size=4, global_attn_indexes=(1,), neck_chans=16
    ),
    "hiera": lambda: models.Hiera(
        img_size=64, embed_dim=24, num_heads=1, stages=(1, 1, 2, 1), num_classes=5
    ),
    "swin": lambda: models.SwinTransformer(
        img_size=64, patch_size=4, embed_dim=24, depths=(2, 2), num_heads=(2, 4), window_size=4,
        num_classes=5,
    ),
}  # fmt: skip


if not timm.is_model("vit_small_patch16_dinov3"):  # timm before 1.0.20
    del FAMILIES["dinov3"]
if "attn_layer" not in signature(models.VisionTransformer).parameters:  # timm before 1.0.23
    del FAMILIES["vit_differential"]


ATTENTION = [name for name, info in sparsiattn.strategies().items() if info.kind == "attention"]
TOKENS = [name for name, info in sparsiattn.strategies().items() if info.kind != "attention"]


def _unfused(model: nn.Module) -> nn.Module:
    """As under ``TIMM_FUSED_ATTN=0``: attention written out, until a patch switches it."""
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    return model


def build(family: str) -> nn.Module:
    """The model in eval mode; weights that start near zero are drawn again, so that every branch
    matters."""
    torch.manual_seed(1)
    model = FAMILIES[family]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.abs().max() < 1e-3:
                parameter.normal_(std=0.1 if parameter.dim() == 1 else 0.02)
    return model


def images(model: nn.Module, batch: int = 2) -> Tensor:
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    rows, columns = size or (64, 64)
    return torch.randn(batch, 3, rows, columns, generator=torch.Generator().manual_seed(2))
