"""Small models of every supported family, made of timm's real classes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from inspect import signature
from typing import Any

import pytest
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


_WINDOWS = {
    "img_size": 64, "patch_size": 4, "embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4),
    "window_size": 4, "num_classes": 5,
}  # fmt: skip
_FOUR = {"num_heads": (1, 2, 2, 4), "mlp_ratios": (2, 2, 2, 2), "num_classes": 5}


def _davit(**options: object) -> nn.Module:
    small = {"depths": (1, 1), "embed_dims": (32, 64), "num_heads": (2, 4), "window_size": 4}
    return models.DaVit(**{**small, **options}, num_classes=5)


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
    "swin": lambda: models.SwinTransformer(**_WINDOWS),
}  # fmt: skip


HIERARCHIES: dict[str, tuple[Callable[[], nn.Module], int]] = {
    # and the side of the images that they take
    "swinv2": (lambda: models.SwinTransformerV2(**_WINDOWS), 64),
    "swinv2_cr": (lambda: models.SwinTransformerV2Cr(**_WINDOWS), 64),
    "sam2": (
        lambda: models.hieradet_sam2.HieraDet(
            embed_dim=24, num_heads=1, stages=(1, 1, 2, 1), global_att_blocks=(3,),
            window_spec=(8, 4, 8, 4), num_classes=5,
        ), 128,
    ),
    "mvitv2": (
        lambda: models.MultiScaleVit(
            models.mvitv2.MultiScaleVitCfg(
                depths=(1, 1), embed_dim=24, num_heads=1, use_cls_token=True
            ), img_size=64, num_classes=5,
        ), 64,
    ),
    "pvt_v2": (
        lambda: models.PyramidVisionTransformerV2(
            depths=(1, 1, 1, 1), embed_dims=(16, 32, 32, 64), **_FOUR
        ), 64,
    ),
    "twins": (
        lambda: models.Twins(
            img_size=64, embed_dims=(16, 32, 32, 64), depths=(2, 1, 1, 1), sr_ratios=(8, 4, 2, 1),
            wss=(4, 4, 4, 2), **_FOUR,
        ), 64,
    ),
    "levit": (
        lambda: models.Levit(
            img_size=64, embed_dim=(32, 48), key_dim=8, depth=(1, 1), num_heads=(2, 3),
            num_classes=5,
        ), 64,
    ),
    "crossvit": (
        lambda: models.CrossVit(
            img_size=64, img_scale=(1.0, 1.0), patch_size=(8, 16), embed_dim=(24, 48),
            depth=((1, 2, 0),), num_heads=(2, 2), mlp_ratio=(2.0, 2.0, 1.0), num_classes=5,
        ), 64,
    ),
    "tnt": (
        lambda: models.TNT(
            img_size=64, patch_size=16, embed_dim=48, inner_dim=8, depth=2, num_heads_inner=2,
            num_heads_outer=3, num_classes=5,
        ), 64,
    ),
    "gcvit": (
        lambda: models.GlobalContextVit(
            img_size=64, window_ratio=(16, 16, 16, 32), embed_dim=16, depths=(2, 2, 1, 1),
            num_heads=(1, 2, 2, 4), num_classes=5,
        ), 64,
    ),
    "nest": (
        lambda: models.Nest(
            img_size=64, patch_size=4, num_levels=2, embed_dims=(24, 48), num_heads=(2, 4),
            depths=(1, 1), num_classes=5,
        ), 64,
    ),
    "davit": (lambda: _davit(), 64),
    "maxvit": (lambda: _created("maxvit_pico_rw_256", img_size=128, depths=(1, 1, 1, 1)), 128),
    "tiny_vit": (
        lambda: _created(
            "tiny_vit_5m_224", depths=(1, 1, 1, 1), embed_dims=(16, 32, 32, 64),
            num_heads=(1, 2, 2, 4), window_sizes=(4, 4, 4, 2),
        ), 64,
    ),
    "efficientvit_msra": (
        lambda: models.EfficientVitMsra(
            img_size=64, embed_dim=(16, 32, 48), key_dim=(8, 8, 8), depth=(1, 1, 1),
            num_heads=(2, 2, 3), window_size=(2, 2, 2), kernels=(3, 3, 3), num_classes=5,
        ), 64,
    ),
    "naflexvit": (
        lambda: _created("naflexvit_base_patch16_gap", embed_dim=48, depth=2, num_heads=3), 64
    ),
    "pit": (
        lambda: models.PoolingVisionTransformer(
            img_size=64, patch_size=8, stride=4, base_dims=(16, 16), depth=(1, 1), heads=(1, 2),
            mlp_ratio=2, num_classes=5, distilled=True,
        ), 64,
    ),
    "convit": (
        lambda: models.ConVit(
            img_size=32, patch_size=8, embed_dim=24, depth=3, local_up_to_layer=1, num_heads=2,
            num_classes=5,
        ), 32,
    ),
    "volo": (
        lambda: models.VOLO(
            layers=(1, 1), embed_dims=(24, 48), num_heads=(2, 4), mlp_ratio=2,
            downsamples=(True, False), outlook_attention=(True, False), img_size=64,
            post_layers=("ca",), num_classes=5,
        ), 64,
    ),
    "visformer": (
        lambda: models.Visformer(
            img_size=64, init_channels=8, embed_dim=48, depth=(0, 1, 1), num_heads=2,
            spatial_conv="100", attn_stage="011", num_classes=5,
        ), 64,
    ),
    "mobilevit": (lambda: _created("mobilevit_xxs"), 64),
    "mobilenetv4": (lambda: _created("mobilenetv4_hybrid_medium"), 128),
    "halo": (lambda: _created("eca_halonext26ts"), 256),
    "botnet": (lambda: _created("botnet26t_256", img_size=128), 128),
    "csatv2": (lambda: _created("csatv2"), 256),
    "shvit": (lambda: _created("shvit_s1"), 128),
    "fastvit": (lambda: _created("fastvit_sa12"), 128),
    "iformer": (lambda: _created("iformer_t"), 128),
    "lowformer": (lambda: _created("lowformer_b0"), 128),
    "deepseek": (
        lambda: _created("deepseek_vit_412m", embed_dim=48, depth=2, num_heads=3), 112
    ),
    "qwen3": (lambda: _created("qwen3_vit_88m", embed_dim=48, depth=2, num_heads=3), 128),
    "gemma4": (lambda: _created("gemma4_vit_167m", embed_dim=48, depth=2, num_heads=3), 192),
}  # fmt: skip


if not timm.is_model("vit_small_patch16_dinov3"):  # timm before 1.0.20
    del FAMILIES["dinov3"]
if "attn_layer" not in signature(models.VisionTransformer).parameters:  # timm before 1.0.23
    del FAMILIES["vit_differential"]
NEWER = {
    "deepseek": "deepseek_vit_412m", "qwen3": "qwen3_vit_88m", "gemma4": "gemma4_vit_167m",
    "iformer": "iformer_t", "lowformer": "lowformer_b0",
}  # fmt: skip
for family in NEWER:  # not in older versions of timm
    if not timm.is_model(NEWER[family]):
        del HIERARCHIES[family]


# `sparsiattn.methods` have suites of their own: 30 strategies on 14 families would be hours.
STRATEGIES = sparsiattn.list_strategies()
CORE = [name for name, info in STRATEGIES.items() if info.plugin == "sparsiattn.strategies"]
ATTENTION = [name for name in CORE if STRATEGIES[name].kind == "attention"]
TOKENS = [name for name in CORE if name not in ATTENTION]


def _unfused(model: nn.Module) -> nn.Module:
    """As under ``TIMM_FUSED_ATTN=0``: attention written out, until a patch switches it."""
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    return model


def build(family: str) -> nn.Module:
    """The model in eval mode; weights that start near zero are drawn again, so that every branch
    matters."""
    return drawn(FAMILIES[family] if family in FAMILIES else HIERARCHIES[family][0])


def drawn(maker: Callable[[], nn.Module]) -> nn.Module:
    """What `build` returns, for any model."""
    torch.manual_seed(1)
    model = maker().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.abs().max() < 1e-3:
                parameter.normal_(std=0.1 if parameter.dim() == 1 else 0.02)
    return model


def images(model: nn.Module, batch: int = 2) -> Tensor:
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    rows, columns = size or (64, 64)
    return torch.randn(batch, 3, rows, columns, generator=torch.Generator().manual_seed(2))


def slow_but(usual: Sequence[Any], *others: Any) -> list[Any]:
    """Parameters of a test of which only the first ones run by default: what it compiles for each
    takes seconds."""
    rows = (x if isinstance(x, tuple) else (x,) for x in others)
    return [*usual, *(pytest.param(*row, marks=pytest.mark.slow) for row in rows)]
