"""What adapters say about class tokens and heads, and what is special about Hugging Face."""

from __future__ import annotations

import pathlib
from typing import Any

import pytest
import timm
import torch
from timm import models
from torch import Tensor, nn

import sparsiattn
from sparsiattn.patching.discovery.backbone import backbone_of
from sparsiattn.registry import REGISTRY
from tests.support import hosts, zoo

CLASSES = {
    "deit_distilled": 2,
    "vit_map_pool": 0,
    "samvit": 0,
    "hiera": 0,
    "swin": 0,
    "vit_relpos": 0,
}
POOLING = {
    "vit": "avg", "vit_map_pool": "other", "vit_relpos": "avg", "dinov3": "avg", "beit": "avg",
    "eva_rope": "avg", "samvit": "other", "hiera": "avg", "swin": "avg",
}  # fmt: skip


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_families_of_timm(family: str) -> None:
    model = zoo.build(family)
    backbone = backbone_of(model)
    assert backbone.class_tokens(model) == CLASSES.get(family, 1)
    assert backbone.class_tokens(nn.Sequential(nn.Identity(), model)) == CLASSES.get(family, 1)
    for whole in (model, nn.Sequential(nn.Identity(), nn.Sequential(model))):
        assert backbone_of(whole).pooling(whole) == POOLING.get(family, "prefix")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"global_pool": "token"}, "prefix"),
        ({"global_pool": "avg"}, "avg"),
        ({"global_pool": "avg", "pool_include_prefix": True}, "other"),
        ({"global_pool": "max"}, "max"),
        ({"global_pool": "avgmax"}, "other"),
        ({"global_pool": "map"}, "other"),
        ({"global_pool": ""}, "other"),
        ({"global_pool": "avg", "class_token": False, "reg_tokens": 4}, "avg"),
    ],
)
def test_pooling_of_a_plain_vit(options: dict[str, Any], expected: str) -> None:
    try:
        model = models.VisionTransformer(**zoo.TINY, **options)
    except TypeError:
        pytest.skip("this timm has no such option")
    assert backbone_of(model).pooling(model) == expected
    assert backbone_of(model).class_tokens(model) == int(options.get("class_token", True))


def test_class_tokens_that_join_late_are_not_leading() -> None:
    for name in ("cait_xxs24_224", "xcit_nano_12_p16_224"):
        model = timm.create_model(name, depth=1)
        # older timm says nothing of prefix tokens there, so that the generic adapter answers
        for adapter in (backbone_of(model), REGISTRY.get("backbones", "generic")):
            assert adapter.class_tokens(model) == 0
            assert adapter.pooling(model) == "other"


def test_feature_extractors_and_wrappers_keep_their_tokens() -> None:
    model = timm.create_model("test_vit", features_only=True)
    assert backbone_of(model).class_tokens(model) == 1
    assert backbone_of(model).pooling(model) == "other"
    wrapped = hosts.OneTensor(hosts.build("vit"))
    assert backbone_of(wrapped).class_tokens(wrapped) == 1
    assert backbone_of(wrapped).pooling(wrapped) == "other"
    chain = nn.Sequential(nn.Identity(), hosts.build("torchvision"))
    assert backbone_of(chain).pooling(chain) == "prefix"


@pytest.mark.parametrize(
    "name", ["vit", "deit", "dinov2_registers", "dinov3", "clip", "torchvision", "clip_tower"]
)
def test_class_tokens_stand_first(name: str) -> None:
    """The rows that enter the first block and change with the class tokens are the first ones."""
    model, x = hosts.OneTensor(hosts.build(name)), hosts.images(1)
    names = ("cls_token", "class_token", "class_embedding", "distillation_token")
    with torch.no_grad():
        before = _entering(model, x)
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.split(".")[-1] in names:
                parameter.normal_()
        changed = (_entering(model, x) - before).abs().amax(-1) > 0
    count = backbone_of(model).class_tokens(model)
    assert changed.tolist() == [True] * count + [False] * (len(changed) - count)


def _entering(model: nn.Module, x: Tensor) -> Tensor:
    """The tokens ``[N, C]`` of the one image that the first site takes."""
    seen: list[Tensor] = []
    with sparsiattn.patch(model, "topk", input=(1, 3, 32, 32)) as live:
        handle = live.runtimes[0].module.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]),
            with_kwargs=True,
        )
        model(x)
        handle.remove()
    return seen[0].reshape(-1, 48)


class TestHuggingFace:
    def config(self, **options: Any) -> Any:
        return pytest.importorskip("transformers").ViTConfig(**hosts.TINY, **options)

    def eager(self) -> nn.Module:
        transformers = pytest.importorskip("transformers")
        torch.manual_seed(1)
        made = transformers.ViTModel._from_config(self.config(), attn_implementation="eager")
        return made.eval()  # type: ignore[no-any-return]

    def test_models_loaded_with_eager_attention(self) -> None:
        model, x = self.eager(), hosts.images()
        with torch.no_grad():
            dense = model(x).last_hidden_state
            with sparsiattn.patch(model, "topk", k=1.0) as live:
                assert len(live.sites) == 2
                assert model.config._attn_implementation == "sdpa"
                torch.testing.assert_close(model(x).last_hidden_state, dense, rtol=1e-5, atol=1e-5)
                with live.disabled():
                    assert model.config._attn_implementation == "eager"
                    assert torch.equal(model(x).last_hidden_state, dense)
            assert model.config._attn_implementation == "eager"
            assert torch.equal(model(x).last_hidden_state, dense)

    def test_parts_keep_their_own_implementation(self) -> None:
        transformers = pytest.importorskip("transformers")
        config = transformers.CLIPConfig(vision_config=hosts.TINY, text_config=hosts.TEXT)
        model = transformers.CLIPForImageClassification(config).eval()
        model.set_attn_implementation({"vision_config": "eager", "": "sdpa"})
        before = model.config.text_config._attn_implementation
        with sparsiattn.patch(model, "topk") as live:
            assert len(live.sites) == 2
            assert model.config.vision_config._attn_implementation == "sdpa"
        assert model.config.vision_config._attn_implementation == "eager"
        assert model.config._attn_implementation == "sdpa"
        assert model.config.text_config._attn_implementation == before

    def test_another_resolution_by_keyword(self) -> None:
        model, seen = hosts.build("vit_model"), []
        live = sparsiattn.patch(model, "local", k=0.25)
        with torch.no_grad(), live.observing(lambda *given: seen.append(given[2].query_grid)):
            model(
                interpolate_pos_encoding=True,
                output_hidden_states=True,
                pixel_values=torch.randn(1, 3, 32, 64),
            )
        assert set(seen) == {(8, 16)}

    def test_the_dry_run_leaves_no_meta_tensor_in_shared_caches(self) -> None:
        """BEiT keeps an index table, made on the default device, for all models in the process."""
        transformers = pytest.importorskip("transformers")
        tiny = {**hosts.TINY, "image_size": 28}  # a size no other test asks for
        config = transformers.BeitConfig(use_relative_position_bias=True, **tiny)
        model, x = transformers.BeitModel(config).eval(), torch.randn(1, 3, 28, 28)
        for name, parameter in model.named_parameters():
            if "bias_table" in name:
                nn.init.normal_(parameter)
        with torch.no_grad():
            with sparsiattn.patch(model, "topk", k=1.0):
                identity = model(x).last_hidden_state
            type(model).forward  # noqa: B018
            bias = next(
                m for m in model.modules() if hasattr(m, "generate_relative_position_index")
            )
            assert bias.generate_relative_position_index((7, 7)).device.type == "cpu"
            torch.testing.assert_close(identity, model(x).last_hidden_state, rtol=1e-5, atol=1e-5)

    def test_siglip2_takes_patches_of_images_of_any_shape(self) -> None:
        transformers = pytest.importorskip("transformers")
        tiny = {n: v for n, v in hosts.TINY.items() if n != "image_size"}
        config = transformers.Siglip2VisionConfig(num_patches=64, **tiny)
        torch.manual_seed(1)
        model = transformers.Siglip2VisionModel(config).eval()
        x, sizes = torch.randn(2, 64, 48), torch.tensor([[8, 8], [6, 8]])
        mask = torch.ones(2, 64, dtype=torch.long)
        mask[1, 48:] = 0
        with torch.no_grad():
            dense = model(x, mask, sizes).last_hidden_state
            live = sparsiattn.patch(model, "topk", k=0.25, background=2)
            assert [(site.tokens, site.grid) for site in live.sites] == [(64, (8, 8))] * 2
            assert "head.attention" in str(live.report())
            sparse = model(x, mask, sizes).last_hidden_state
            assert not torch.allclose(sparse, dense)
            x[1, 48:] += 5
            padded = model(x, mask, sizes).last_hidden_state
            torch.testing.assert_close(padded[1, :48], sparse[1, :48])
            live.unpatch()
            with sparsiattn.patch(model, "topk", k=1.0):
                again = model(x, mask, sizes).last_hidden_state
                torch.testing.assert_close(again[1, :48], dense[1, :48], rtol=1e-5, atol=1e-5)

    def test_tokens_out_of_order_have_no_grid(self) -> None:
        transformers = pytest.importorskip("transformers")
        config = transformers.ViTMAEConfig(**{**hosts.TINY, "image_size": [32, 32]})
        model = transformers.ViTMAEModel(config).eval()
        with sparsiattn.patch(model, "topk", input=(1, 3, 32, 32)) as live:
            assert not live.sites[0].raster


@pytest.mark.parametrize("name", ["dinov2_registers", "torchvision", "clip_tower"])
def test_save_and_load(name: str, tmp_path: pathlib.Path) -> None:
    model, x = hosts.OneTensor(hosts.build(name)), hosts.images()
    with torch.no_grad():
        with sparsiattn.patch(model, k=0.25) as live:
            for parameter in live.runtimes[0].planner.parameters():  # type: ignore[union-attr]
                parameter.normal_()
            sparse = model(x)
            live.save(tmp_path)
        with sparsiattn.load(model, tmp_path):
            assert torch.equal(model(x), sparse)


@pytest.mark.parametrize("registers", [0, 2])
def test_class_tokens_of_ones_own_vit(registers: int) -> None:
    """Without `num_prefix_tokens`, dropping scores by the class token as with it."""
    plain = models.VisionTransformer(**zoo.TINY, reg_tokens=registers).eval()
    x = zoo.images(plain)
    strategies: dict[str, Any] = {"token_drop": {"keep": 0.4}, "token_merge": {"r": 3}}
    for strategy, options in strategies.items():
        with sparsiattn.patch(plain, strategy, input=x.shape, **options):
            expected = plain(x)
        own = OwnViT(plain)
        with sparsiattn.patch(own, strategy, input=x.shape, **options) as patch:
            assert patch.backbone == "generic"
            torch.testing.assert_close(own(x), expected)


class OwnViT(nn.Module):
    """The modules of timm's ViT in a class that no adapter knows."""

    def __init__(self, vit: Any) -> None:
        super().__init__()
        self.embed, self.layers = vit.patch_embed, vit.blocks
        self.norm, self.head = vit.norm, vit.head
        self.cls_token, self.positions = vit.cls_token, vit.pos_embed
        self.register_tokens = vit.reg_token

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        first = [self.cls_token, *([] if self.register_tokens is None else [self.register_tokens])]
        x = torch.cat([*(part.expand(len(x), -1, -1) for part in first), x], dim=1)
        x = x + self.positions
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x)[:, 0])
