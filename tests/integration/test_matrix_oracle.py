"""Every model of the zoo against attention by hand, on the true places of its tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import timm
import torch
from timm import models
from torch import Tensor, nn
from torch.nn import functional as F

import sparsiattn
from tests.support import zoo
from tests.support.oracle_hosts import RULES, Host, disagreements, unrolled
from tests.support.tokens_by_hand import Drop, Merge, Shortened

PLAIN = ((8, 8),)
WINDOWS = ((4, 4),)
STAGES = ((16, 16), (8, 8), (4, 4), (2, 2), (1, 1))
HOSTS: dict[str, Host] = {
    "vit": Host(PLAIN, 1),
    "vit_registers": Host(PLAIN, 5),
    "vit_map_pool": Host(PLAIN),
    "vit_parallel": Host(PLAIN, 1),
    "vit_differential": Host(PLAIN, 1, shared=True),
    "vit_unfused": Host(PLAIN, 1),
    "vit_relpos": Host(PLAIN),
    "deit_distilled": Host(PLAIN, 2),
    "dinov3": Host(PLAIN, 5),
    "eva_rope": Host(PLAIN, 1),
    "beit": Host(PLAIN, 1),
    "samvit": Host(((4, 4), (8, 8))),
    "hiera": Host(STAGES, order=unrolled),
    "swin": Host(WINDOWS),
    "swinv2": Host(WINDOWS),
    "swinv2_cr": Host(WINDOWS),
    "sam2": Host(STAGES),
    "mvitv2": Host(STAGES, 1),
    "pvt_v2": Host(STAGES),
    "twins": Host(STAGES),
    "levit": Host(STAGES),
    "crossvit": Host(STAGES, 1),
    "tnt": Host(STAGES, 1, prefixed="attn_out"),
    "gcvit": Host(STAGES),
    "nest": Host(STAGES),
    "davit": Host(STAGES),
    "maxvit": Host(STAGES),
    "tiny_vit": Host(STAGES),
    "efficientvit_msra": Host(STAGES),
    "naflexvit": Host(STAGES, 4),
    "pit": Host(((15, 15), (8, 8)), 2),
    "convit": Host(STAGES, 1),
    "volo": Host(STAGES),
    "visformer": Host(STAGES),
    "mobilevit": Host(STAGES),
    "mobilenetv4": Host(STAGES),
    "halo": Host(((4, 4), (8, 8), (12, 12)), halo=2),
    "botnet": Host(STAGES),
    "csatv2": Host(STAGES),
    "shvit": Host(STAGES),
    "fastvit": Host(STAGES),
    "iformer": Host(STAGES),
    "lowformer": Host(STAGES),
    "deepseek": Host(PLAIN),
    "qwen3": Host(PLAIN),
    "gemma4": Host(((12, 12),)),
}
HOSTS = {name: HOSTS[name] for name in (*zoo.FAMILIES, *zoo.HIERARCHIES)}
WIDE = ((8, 12),)
WIDE_STAGES = (*((2 * side, 3 * side) for side in (8, 4, 2, 1)), (8, 8), (4, 4), (2, 2), (1, 2))
TINY = {**zoo.TINY, "img_size": (32, 48)}


def _wide(name: str, **options: Any) -> Callable[[], nn.Module]:
    small = {"embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 5}
    return lambda: timm.create_model(name, **{**small, **options})


# rows and columns that differ tell one from the other
HOSTS |= {
    "wide vit": Host(WIDE, 1, image=(32, 48), make=lambda: models.VisionTransformer(**TINY)),
    "wide relpos": Host(
        WIDE, image=(32, 48), make=lambda: models.VisionTransformerRelPos(**TINY)
    ),
    "wide beit": Host(
        WIDE, 1, image=(32, 48), make=lambda: models.Beit(**TINY, use_rel_pos_bias=True)
    ),
    "wide dinov3": Host(
        WIDE, 5, image=(128, 192), make=_wide("vit_small_patch16_dinov3", img_size=(128, 192))
    ),
    "wide eva": Host(
        WIDE, 1, image=(112, 168), make=_wide("eva02_tiny_patch14_224", img_size=(112, 168))
    ),
    "wide samvit": Host(
        ((4, 4), (8, 12)), image=(32, 48), make=lambda: models.VisionTransformerSAM(
            **TINY, use_rel_pos=True, window_size=4, global_attn_indexes=(1,), neck_chans=16
        ),
    ),
    "wide swin": Host(
        ((4, 2),), image=(64, 96), make=lambda: models.SwinTransformer(
            img_size=(64, 96), embed_dim=24, depths=(2, 2), num_heads=(2, 4), window_size=(4, 2),
            num_classes=5,
        ),
    ),
    **{f"wide {name}": Host(WIDE_STAGES, image=(side, side * 3 // 2), make=zoo.HIERARCHIES[name][0])
       for name, side in (("pvt_v2", 64), ("mobilevit", 64), ("iformer", 128), ("twins", 64),
                          ("sam2", 128), ("davit", 64)) if name in zoo.HIERARCHIES},
    **{f"wide {name}": Host(WIDE, image=image, make=zoo.HIERARCHIES[name][0])
       for name, image in (("qwen3", (128, 192)), ("deepseek", (112, 168)))
       if name in zoo.HIERARCHIES},  # not in older versions of timm
    "wide naflexvit": Host(WIDE, 4, image=(128, 192), make=zoo.HIERARCHIES["naflexvit"][0]),
    # what is patched is one image, what runs another
    "other size": Host(
        WIDE, 1, image=(32, 48), patched=(32, 32),
        make=lambda: models.VisionTransformer(**zoo.TINY, dynamic_img_size=True),
    ),
    "resized": Host(
        WIDE, 1, image=(40, 40), make=lambda: nn.Sequential(
            nn.Upsample(size=(32, 48)), models.VisionTransformer(**TINY)
        ),
    ),
    "padded windows": Host(
        WINDOWS, image=(40, 56), make=lambda: models.VisionTransformerSAM(
            **{**zoo.TINY, "img_size": (40, 56)}, use_rel_pos=True, window_size=4,
            global_attn_indexes=(), neck_chans=16,
        ),
    ),
}  # fmt: skip


def _given(host: Host, images: Tensor) -> tuple[int, ...]:
    """The shape given to `patch`."""
    return (*images.shape[:2], *(host.patched or images.shape[2:]))


def _model(name: str) -> tuple[nn.Module, Tensor]:
    """A host and two images for it."""
    host = HOSTS[name]
    model = zoo.build(name) if host.make is None else zoo.drawn(host.make)
    if host.image is None and name in zoo.FAMILIES:
        return model, zoo.images(model)
    rows, columns = host.image or 2 * (zoo.HIERARCHIES[name][1],)
    return model, torch.randn(2, 3, rows, columns, generator=torch.Generator().manual_seed(2))


REFUSED = {("hiera", "local")}
"""Cells that raise: they need places that the library cannot know."""
# the tables of a predictor are weights, and resized as such; without places they lie along the
# sequence, which the report says
WITHOUT_PLACES = {("other size", "connectivity"), ("hiera", "connectivity")}
CELLS = [
    pytest.param(name, strategy, id=f"{name}-{strategy}")
    for name in HOSTS
    for strategy in RULES
    if (name, strategy) not in WITHOUT_PLACES
]


@pytest.mark.parametrize(("name", "strategy"), CELLS)
@torch.no_grad()
def test_attention_keeps_what_its_rule_says(name: str, strategy: str) -> None:
    (model, images), host = _model(name), HOSTS[name]
    run, size = partial(model, images), _given(host, images)
    if (name, strategy) in REFUSED:
        with pytest.raises(sparsiattn.SparsiattnError, match="where tokens are in the image"):
            disagreements(model, run, host, strategy, size)
    else:
        assert disagreements(model, run, host, strategy, size) == []


@dataclass(frozen=True)
class Plain:
    """A host whose blocks hand on one sequence. classes: class tokens among its prefix; whole: its
    head reads every position; blocks: where they are."""

    classes: int = 0
    whole: bool = False
    blocks: Callable[[Any], list[Any]] = lambda model: list(model.blocks)


SHORT: dict[str, Plain] = {
    "vit": Plain(1),
    "vit_registers": Plain(1),
    "vit_map_pool": Plain(),
    "vit_parallel": Plain(1),
    "vit_differential": Plain(1),
    "vit_unfused": Plain(1),
    "vit_relpos": Plain(),
    "deit_distilled": Plain(2),
    "dinov3": Plain(1),
    "eva_rope": Plain(1),
    "beit": Plain(1),
    "naflexvit": Plain(),
    "convit": Plain(1, blocks=lambda model: list(model.blocks[1:])),
    "deepseek": Plain(whole=True, blocks=lambda model: list(model.encoder.blocks)),
    "qwen3": Plain(whole=True, blocks=lambda model: list(model.encoder.blocks)),
    "gemma4": Plain(blocks=lambda model: list(model.encoder.blocks)),
}
SHORT |= {
    "wide vit": SHORT["vit"], "wide relpos": SHORT["vit_relpos"], "wide beit": SHORT["beit"],
    "wide dinov3": SHORT["dinov3"], "wide eva": SHORT["eva_rope"], "wide qwen3": SHORT["qwen3"],
    "wide deepseek": SHORT["deepseek"], "wide naflexvit": SHORT["naflexvit"],
    "other size": SHORT["vit"], "resized": Plain(1, blocks=lambda model: list(model[1].blocks)),
}  # fmt: skip
TOKENS = {"token_drop": {"keep": 0.5}, "token_merge": {"r": 4}}


def _fuse(model: nn.Module) -> None:
    """Hosts that write their softmax themselves take the same sums from torch's own function."""
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = True
        if type(module).__name__ == "MHSA":
            module.forward = partial(_attend, module)


def _attend(attn: Any, x: Tensor) -> Tensor:
    q, k, v = attn.qkv(x).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
    return attn.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("strategy", TOKENS)
@pytest.mark.parametrize("name", HOSTS)
@torch.no_grad()
def test_tokens_that_are_left_are_those_of_the_paper(name: str, strategy: str) -> None:
    (model, images), host, options = _model(name), HOSTS[name], TOKENS[strategy]
    plain = SHORT.get(name)
    if plain is None:
        with pytest.raises(sparsiattn.SparsiattnError, match="tokens"):
            sparsiattn.patch(model, strategy, input=_given(host, images), **options)
        return
    with sparsiattn.patch(model, strategy, input=_given(host, images), **options):
        out = model(images)
    _fuse(model)
    reduce: Any = Drop(0.5, plain.classes) if strategy == "token_drop" else Merge(4)
    oracle = Shortened(model, plain.blocks(model), host.prefix, reduce)
    expected = oracle(images, plain.whole or strategy == "token_merge")
    torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-4)
