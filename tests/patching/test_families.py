"""Tokens, grids, windows and prefixes of every family, against what its architecture says; what is
left alone, and why."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import sparsiattn
from sparsiattn import NothingToPatch, Patch
from sparsiattn.strategies import Local
from tests.support import zoo

# Of some sites: tokens, keys, grid, key grid, prefix tokens, windows, what the host's mask does.
EXPECTED: dict[str, dict[str, tuple[Any, ...]]] = {
    # 64 pixels in patches of 4: a grid of 16 x 16 in windows of 4 x 4, then of 8 x 8
    "swin": {
        "layers.0.blocks.0.attn": (16, 16, (4, 4), (4, 4), 0, 16, "bias"),
        "layers.0.blocks.1.attn": (16, 16, (4, 4), (4, 4), 0, 16, "mask"),  # shifted
        "layers.1.blocks.0.attn": (16, 16, (4, 4), (4, 4), 0, 4, "bias"),
    },
    "swinv2": {
        "layers.0.blocks.0.attn": (16, 16, (4, 4), (4, 4), 0, 16, "bias"),
        "layers.0.blocks.1.attn": (16, 16, (4, 4), (4, 4), 0, 16, "mask"),
    },
    "swinv2_cr": {
        "stages.0.blocks.0.attn": (16, 16, (4, 4), (4, 4), 0, 16, "bias"),
        "stages.1.blocks.1.attn": (16, 16, (4, 4), (4, 4), 0, 4, "mask"),
    },
    # 32 x 32, windows of 8; queries pooled 2 x 2 where stages change; block 3 is global
    "sam2": {
        "blocks.0.attn": (64, 64, (8, 8), (8, 8), 0, 16, "none"),
        "blocks.1.attn": (16, 64, (4, 4), (8, 8), 0, 16, "none"),
        "blocks.2.attn": (4, 16, (2, 2), (4, 4), 0, 16, "none"),
        "blocks.3.attn": (64, 64, (8, 8), (8, 8), 0, 1, "none"),
    },
    # keys pooled by 4, a class token in front of both
    "mvitv2": {
        "stages.0.blocks.0.attn": (257, 17, (16, 16), (4, 4), 1, 1, "bias"),
        "stages.1.blocks.0.attn": (65, 65, (8, 8), (8, 8), 1, 1, "bias"),
    },
    # keys pooled by 8, 4, 2, 1 to the same 2 x 2
    "pvt_v2": {
        "stages.0.blocks.0.attn": (256, 4, (16, 16), (2, 2), 0, 1, "none"),
        "stages.3.blocks.0.attn": (4, 4, (2, 2), (2, 2), 0, 1, "none"),
    },
    "twins": {
        "blocks.0.0.attn": (16, 16, (4, 4), (4, 4), 0, 16, "none"),
        "blocks.0.1.attn": (256, 4, (16, 16), (2, 2), 0, 1, "none"),
    },
    "levit": {
        "stages.0.blocks.0.attn": (16, 16, (4, 4), (4, 4), 0, 1, "bias"),
        "stages.1.downsample.attn_downsample": (4, 16, (2, 2), (4, 4), 0, 1, "bias"),
    },
    # two branches with patches of 8 and of 16 pixels, each with its class token
    "crossvit": {
        "blocks.0.blocks.0.0.attn": (65, 65, (8, 8), (8, 8), 1, 1, "none"),
        "blocks.0.blocks.1.0.attn": (17, 17, (4, 4), (4, 4), 1, 1, "none"),
    },
    # 16 patches with a class token outside, 4 x 4 pixels of each inside
    "tnt": {
        "blocks.0.attn_in": (16, 16, (4, 4), (4, 4), 0, 16, "none"),
        "blocks.0.attn_out": (17, 17, (4, 4), (4, 4), 1, 1, "none"),
    },
    # every second block takes its queries from the whole image, one set for all windows
    "gcvit": {
        "stages.0.blocks.0.attn": (16, 16, (4, 4), (4, 4), 0, 16, "bias"),
        "stages.0.blocks.1.attn": (16, 16, (4, 4), (4, 4), 0, 16, "bias"),
    },
    "nest": {
        "levels.0.transformer_encoder.0.attn": (64, 64, (8, 8), (8, 8), 0, 4, "none"),
        "levels.1.transformer_encoder.0.attn": (64, 64, (8, 8), (8, 8), 0, 1, "none"),
    },
    "davit": {
        "stages.0.blocks.0.0.attn": (16, 16, (4, 4), (4, 4), 0, 16, "none"),
        "stages.1.blocks.0.0.attn": (16, 16, (4, 4), (4, 4), 0, 4, "none"),
    },
    # 128 pixels, stride 4, windows (and strided grids) of 4 x 4
    "maxvit": {
        "stages.0.blocks.0.attn_block.attn": (16, 16, (4, 4), (4, 4), 0, 64, "bias"),
        "stages.0.blocks.0.attn_grid.attn": (16, 16, (4, 4), (4, 4), 0, 64, "bias"),
        "stages.3.blocks.0.attn_grid.attn": (16, 16, (4, 4), (4, 4), 0, 1, "bias"),
    },
    "tiny_vit": {
        "stages.1.blocks.0.attn": (16, 16, (4, 4), (4, 4), 0, 4, "bias"),
        "stages.3.blocks.0.attn": (4, 4, (2, 2), (2, 2), 0, 1, "bias"),
    },
    # one call for each head
    "efficientvit_msra": {
        "stages.0.blocks.0.mixer.m.attn": (4, 4, (2, 2), (2, 2), 0, 4, "bias"),
    },
    "naflexvit": {"blocks.0.attn": (20, 20, (4, 4), (4, 4), 4, 1, "none")},
    # class and distillation token are one parameter; (64 - 8) / 4 + 1 = 15 patches a side
    "pit": {
        "transformers.0.blocks.0.attn": (227, 227, (15, 15), (15, 15), 2, 1, "none"),
        "transformers.1.blocks.0.attn": (66, 66, (8, 8), (8, 8), 2, 1, "none"),
    },
    "convit": {"blocks.1.attn": (17, 17, (4, 4), (4, 4), 1, 1, "none")},
    "volo": {"network.2.0.attn": (16, 16, (4, 4), (4, 4), 0, 1, "none")},
    "visformer": {"stage2.0.attn": (16, 16, (4, 4), (4, 4), 0, 1, "none")},
    # one of the 2 x 2 pixels of every patch at a time
    "mobilevit": {"stages.2.1.transformer.0.attn": (16, 16, (4, 4), (4, 4), 0, 4, "none")},
    "mobilenetv4": {"blocks.2.4.attn": (64, 16, (8, 8), (4, 4), 0, 1, "none")},
    # blocks of 8 x 8 and 2 more keys on every side
    "halo": {
        "stages.2.1.self_attn": (64, 144, (8, 8), (12, 12), 0, 4, "bias"),
        "stages.3.0.self_attn": (16, 144, (4, 4), (12, 12), 0, 4, "bias"),  # strided queries
    },
    "botnet": {"stages.2.1.self_attn": (64, 64, (8, 8), (8, 8), 0, 1, "bias")},
    "deepseek": {"encoder.blocks.0.attn": (64, 64, (8, 8), (8, 8), 0, 1, "none")},
    "qwen3": {"encoder.blocks.0.attn": (64, 64, (8, 8), (8, 8), 0, 1, "none")},
    "gemma4": {"encoder.blocks.0.attn": (144, 144, (12, 12), (12, 12), 0, 1, "none")},
    "csatv2": {"stages.2.7.attn": (64, 64, (8, 8), (8, 8), 0, 1, "none")},
    "shvit": {"stages.1.blocks.0.mixer.m": (16, 16, (4, 4), (4, 4), 0, 1, "none")},
    "fastvit": {"stages.3.blocks.0.token_mixer": (16, 16, (4, 4), (4, 4), 0, 1, "none")},
    "iformer": {"stages.2.blocks.7.mixer.module": (64, 64, (8, 8), (8, 8), 0, 1, "none")},
    "lowformer": {"stages.2.1.attn.main.1": (16, 16, (4, 4), (4, 4), 0, 1, "none")},
}
LARGE = ("csatv2", "shvit", "fastvit", "iformer", "lowformer")

LEFT = {
    "davit": {"stages.0.blocks.0.1.attn": "over channels"},
    "crossvit": {"blocks.0.fusion.0.attn": "a single query"},
    "volo": {
        "post_network.0.attn": "a single query",
        "network.0.0.attn": "not attention between tokens",  # outlook attention
    },
    "convit": {"blocks.0.attn": "mul"},  # gated positional attention
    "csatv2": {"stages.0.0.attn.attn": "not attention between tokens"},  # over the batch
}

REFUSED = {
    "cait": (
        lambda: timm.models.Cait(img_size=32, patch_size=8, embed_dim=24, depth=1, num_heads=2),
        ["blocks.0.attn: hand-written", "blocks_token_only.0.attn: a single query"],
    ),
    "xcit": (
        lambda: timm.models.Xcit(img_size=64, embed_dim=32, depth=1, num_heads=2),
        ["blocks.0.attn: attention over channels", "cls_attn_blocks.0.attn: a single query"],
    ),
    "edgenext": (
        lambda: timm.create_model("edgenext_xx_small"),
        ["stages.1.blocks.1.xca: attention over channels"],
    ),
    "lambda": (
        lambda: timm.create_model("lambda_resnet26t"),
        ["stages.2.1.self_attn: its softmax is not attention between tokens"],
    ),
    "separable": (
        lambda: timm.create_model("mobilevitv2_050"),
        ["stages.2.1.transformer.0.attn: its softmax is not attention between tokens"],
    ),
    "clip_resnet": (
        lambda: timm.create_model("resnet50_clip"),
        ["head: a pooling head that returns one vector"],
    ),
}  # fmt: skip


def side(family: str) -> int:
    return zoo.HIERARCHIES[family][1] if family in zoo.HIERARCHIES else 64


def patched(model: nn.Module, family: str, strategy: str = "topk", **options: Any) -> Patch:
    return sparsiattn.patch(model, strategy, input=(1, 3, side(family), side(family)), **options)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(f, marks=pytest.mark.slow if f in LARGE else [])
        for f in EXPECTED
        if f in zoo.FAMILIES or f in zoo.HIERARCHIES
    ],
)
def test_sites_identity_change_and_undo(family: str) -> None:
    model = zoo.build(family)
    x = torch.randn(2, 3, *2 * (side(family),), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        dense = model(x)
        with patched(model, family, k=1.0) as live:
            assert relative(model(x), dense) <= 1e-5
            found = {site.name: site for site in live.model_sites}
            left = dict(live.skipped)
        live = patched(model, family, k=0.25)
        assert relative(model(x), dense) > 1e-5
        live.unpatch()
        assert torch.equal(model(x), dense)
    for name, expected in EXPECTED[family].items():
        site = found[name]
        got = (site.tokens, site.keys, site.grid, site.key_grid, site.prefix_tokens, site.windows)
        assert (*got, site.bias) == expected, name
        assert site.raster
    for name, reason in LEFT.get(family, {}).items():
        assert name not in found
        assert reason in left[name]


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_attention_between_tokens_is_refused_by_name(name: str) -> None:
    make, reasons = REFUSED[name]
    with torch.device("meta"):
        model = make().eval()
    with pytest.raises(NothingToPatch) as error:
        sparsiattn.patch(model, "topk", input=None if name != "xcit" else (1, 3, 64, 64))
    assert all(reason in str(error.value) for reason in reasons), error.value


@pytest.mark.parametrize("tokens", [3, 4, 5])
def test_channels_are_told_from_tokens_also_where_shapes_agree(tokens: int) -> None:
    """16 channels a head, and 9, 16 or 25 tokens: in windows, and over all of them."""
    model = zoo._davit(window_size=tokens).eval()
    live = sparsiattn.patch(model, "topk", input=(1, 3, 4 * tokens, 4 * tokens), sites="stages.0.*")
    names = [site.name for site in live.model_sites if site.name.startswith("stages.0")]
    assert names == ["stages.0.blocks.0.0.attn"]
    assert live.model_sites[0].tokens == tokens**2
    assert ("stages.0.blocks.0.1.attn", "attention over channels, not over tokens") in live.skipped


def test_one_call_for_each_head_and_one_head_of_keys() -> None:
    with patched(zoo.build("efficientvit_msra"), "efficientvit_msra") as live:
        assert [(site.calls, site.heads) for site in live.model_sites] == [(2, 1), (2, 1)]
    with patched(zoo.build("mobilenetv4"), "mobilenetv4") as live:
        assert live.model_sites[0].heads == 4


def reached(module: nn.Module, x: Tensor, query: tuple[int, ...], at: tuple[int, ...]) -> bool:
    """Whether the output at one place depends on the input at another."""
    changed = x.clone()
    changed[at] = -x[at]
    with torch.no_grad():
        return not torch.equal(module(x)[query], module(changed)[query])


def nhwc(row: int, column: int) -> tuple[int, ...]:
    return 0, row, column


def nchw(row: int, column: int) -> tuple[Any, ...]:
    return 0, slice(None), row, column


@pytest.mark.parametrize(
    ("family", "path", "shape", "at", "query", "near", "far"),
    [
        ("swin", "layers.0.blocks.0", (16, 16, 24), nhwc, (0, 0), (1, 1), (3, 3)),
        ("swin", "layers.0.blocks.1", (16, 16, 24), nhwc, (2, 2), (3, 3), (5, 5)),  # shifted by 2
        ("swinv2", "layers.0.blocks.0", (16, 16, 24), nhwc, (4, 4), (5, 5), (7, 7)),
        # a window of the grid takes every eighth place
        ("maxvit", "stages.0.blocks.0.attn_grid", (32, 32, 32), nhwc, (0, 0), (8, 8), (24, 24)),
        # keys beyond the edge of the block that the query is in
        ("halo", "stages.2.1.self_attn", (256, 16, 16), nchw, (7, 7), (8, 8), (4, 4)),
        ("halo", "stages.2.1.self_attn", (256, 16, 16), nchw, (4, 4), (5, 5), (8, 4)),
    ],
)
def test_local_keeps_neighbours(
    family: str, path: str, shape: tuple[int, ...], at: Any, query: Any, near: Any, far: Any
) -> None:
    model = zoo.build(family)
    part = model.get_submodule(path)
    x = torch.randn(1, *shape, generator=torch.Generator().manual_seed(3))
    assert reached(part, x, at(*query), at(*far))
    with patched(model, family, "local", k=4 if family != "halo" else 9, background=None):
        assert reached(part, x, at(*query), at(*near))
        assert not reached(part, x, at(*query), at(*far))


def _padded(model: nn.Module, filler: float) -> dict[str, Tensor]:
    """Two images in patches: one of 4 x 4, one of 2 x 6 with four patches of padding."""
    generator = torch.Generator().manual_seed(4)
    patches = torch.randn(2, 16, 16 * 16 * 3, generator=generator)
    patches[1, 12:] = filler
    square = torch.cartesian_prod(torch.arange(4), torch.arange(4))
    wide = torch.cartesian_prod(torch.arange(2), torch.arange(6))
    coord = torch.stack([square, torch.cat([wide, torch.zeros(4, 2, dtype=wide.dtype)])])
    valid = torch.ones(2, 16, dtype=torch.bool)
    valid[1, 12:] = False
    return {"patches": patches, "patch_coord": coord, "patch_valid": valid}


@pytest.mark.parametrize("tile", [1, (2, 2)])
@pytest.mark.parametrize("strategy", ["topk", "connectivity"])
def test_padding_of_cut_patches_is_respected(strategy: str, tile: Any) -> None:
    model = zoo.build("naflexvit")
    with torch.no_grad():
        dense = model(_padded(model, 0.0))
        with patched(model, "naflexvit", strategy, k=1.0, tile=tile):
            assert relative(model(_padded(model, 0.0)), dense) <= 1e-5
        with patched(model, "naflexvit", strategy, k=0.5, tile=tile):
            sparse = model(_padded(model, 0.0))
            assert relative(sparse, dense) > 1e-5
            torch.testing.assert_close(model(_padded(model, 9.0)), sparse)


def test_images_of_several_shapes_have_no_one_grid() -> None:
    model = zoo.build("naflexvit")
    refused = pytest.raises(sparsiattn.SparsiattnError, match="positions in the image")
    with torch.no_grad(), patched(model, "naflexvit", "local", k=0.5), refused:
        model(_padded(model, 0.0))


@pytest.mark.parametrize("family", ["swin", "swinv2", "swinv2_cr"])
def test_swin_skips_tokens(family: str) -> None:
    """The MLP alone is skipped: windows need their grid."""
    model, x = zoo.build(family), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        dense = model(x)
        with patched(model, family, "token_drop", keep=1.0, score="norm", layers=[1, 2]):
            assert relative(model(x), dense) <= 1e-5
        live = patched(model, family, "token_drop", keep=0.5, score="norm", layers=[1, 2])
        assert relative(model(x), dense) > 1e-5
        report = live.report()
        assert report.macs is not None
        assert report.macs < report.macs_dense
        assert all("skip only the MLP" in line for line in report.reductions)
        live.unpatch()
        assert torch.equal(model(x), dense)


@pytest.mark.parametrize(
    ("family", "block", "patches"),
    [("mvitv2", "stages.0.blocks.0", 256), ("crossvit", "blocks.0.blocks.0.0", 64)],
)
def test_class_tokens_never_skip_the_mlp(family: str, block: str, patches: int) -> None:
    model, x = zoo.build(family), torch.randn(2, 3, 64, 64)
    taken: list[Tensor] = []
    live = patched(model, family, "token_drop", keep=0.25, score="norm", layers=[0])
    norm = model.get_submodule(block).norm2
    hook = norm.register_forward_pre_hook(lambda module, args: taken.append(args[0]))
    with torch.no_grad():
        model(x)
        with live.disabled():
            model(x)
    hook.remove()
    short, full = taken
    assert full.shape[1] == 1 + patches
    assert short.shape[1] == 1 + patches // 4
    torch.testing.assert_close(short[:, 0], full[:, 0])
    largest = full[:, 1:].norm(dim=-1).topk(patches // 4).values
    torch.testing.assert_close(short[:, 1:].norm(dim=-1).sort(-1, True).values, largest)


def test_queries_lie_in_the_middle_of_a_margin() -> None:
    """One query block of 2 x 2 with one more key on every side: each finds itself first."""
    q, k = torch.zeros(1, 1, 4, 8), torch.zeros(1, 1, 16, 8)
    site = sparsiattn.Site.of(q, k, k, halo=1)
    inputs = sparsiattn.AttentionInputs(q, k, k, 1.0, None, site)
    pattern = Local(k=1).plan(inputs)
    assert pattern.scores.argmax(-1).flatten().tolist() == [5, 6, 9, 10]


@pytest.mark.parametrize("strategy", ["topk", "connectivity", "random"])
def test_class_attention_is_a_site_where_it_is_named(strategy: str) -> None:
    """A single query saves next to nothing: only who names it gets it."""
    torch.manual_seed(1)
    model = timm.models.Xcit(img_size=64, embed_dim=32, depth=1, num_heads=2, num_classes=5).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    name, x = "cls_attn_blocks.0.attn", torch.randn(2, 3, 64, 64)
    with pytest.raises(NothingToPatch, match="only sites= with this name"):
        sparsiattn.patch(model, strategy, sites="*")
    with torch.no_grad():
        dense = model(x)
        with sparsiattn.patch(model, strategy, k=1.0, sites=name, input=x):
            assert relative(model(x), dense) <= 1e-5
        with sparsiattn.patch(model, strategy, k=0.25, sites=[name], input=x) as live:
            assert [(s.name, s.tokens, s.keys) for s in live.sites] == [(name, 1, 17)]
            assert not torch.allclose(model(x), dense)
        assert torch.equal(model(x), dense)


SWINS = {
    "swin_tiny": lambda: timm.create_model("swin_tiny_patch4_window7_224"),
    "swin_base": lambda: timm.create_model("swin_base_patch4_window7_224"),
    "swinv2_tiny": lambda: timm.create_model("swinv2_tiny_window8_256"),
}
BUDGETS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("connectivity", {"k": 1.0}, {"k": 0.25}),
    ("topk", {"k": 1.0}, {"k": 0.25}),
    ("local", {"k": 1.0}, {"k": 0.25}),
    ("token_drop", {"keep": 1.0, "score": "norm"}, {"keep": 0.5, "score": "norm"}),
]


@pytest.mark.slow
@pytest.mark.parametrize("name", SWINS)
def test_real_swins(name: str) -> None:
    torch.manual_seed(1)
    model = SWINS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.abs().max() < 1e-3:
                parameter.normal_(std=0.1 if parameter.dim() < 2 else 0.02)
        x = torch.randn(1, *model.pretrained_cfg["input_size"])
        dense = model(x)
        for strategy, whole, part in BUDGETS:
            with sparsiattn.patch(model, strategy, **whole):
                assert relative(model(x), dense) <= 1e-5
            with sparsiattn.patch(model, strategy, **part):
                assert relative(model(x), dense) > 1e-3
            assert torch.equal(model(x), dense)
