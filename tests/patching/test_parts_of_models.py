"""What takes no image: parts of models that take tokens, calls with keywords, packed images."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import sparsiattn
from sparsiattn import InvalidOption, SparsiattnError
from tests.support.strongest_keys import strongest_keys

pytestmark = pytest.mark.filterwarnings("ignore:which tokens")  # nothing tells a part's own

TOKENS = torch.randn(2, 101, 64, generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def vit() -> Any:
    torch.manual_seed(0)
    return timm.create_model("test_vit").eval()


def encoder(**options: Any) -> nn.Module:
    layer = nn.TransformerEncoderLayer(64, 2, 96, **options)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()


def check(part: nn.Module, call: Callable[[], Tensor], given: Any, sites: int) -> None:
    """Patched by this input it computes what is done by hand, and unpatched what it did."""
    dense = call()
    with strongest_keys(25):
        expected = call()
    with sparsiattn.patch(part, "topk", k=25, prefix_keys=False, tile=1, input=given) as patch:
        assert len(patch.sites) == sites
        assert {site.tokens for site in patch.sites} == {101}
        torch.testing.assert_close(call(), expected, rtol=1e-4, atol=1e-5)
        report = patch.report()
        assert report.macs < report.macs_dense
    torch.testing.assert_close(call(), dense)
    assert not torch.allclose(dense, expected, atol=1e-4)


GIVEN = [TOKENS, TOKENS[:1], (2, 101, 64), (TOKENS,)]


@pytest.mark.parametrize("given", GIVEN, ids=["batch", "one", "shape", "arguments"])
@torch.no_grad()
def test_blocks_of_a_vit(vit: Any, given: Any) -> None:
    check(vit.blocks, lambda: vit.blocks(TOKENS), given, sites=6)


@torch.no_grad()
def test_a_block_and_its_attention(vit: Any) -> None:
    check(vit.blocks[0], lambda: vit.blocks[0](TOKENS), TOKENS, sites=1)
    check(vit.blocks[0].attn, lambda: vit.blocks[0].attn(TOKENS), TOKENS, sites=1)


class Unshaped(nn.Module):
    """Takes tokens with any dimensions in front, so it would take an image, too."""

    num_heads = 2

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(64, 192)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 32)).movedim(-3, 0).transpose(-2, -3)
        out = nn.functional.scaled_dot_product_attention(q, k, v)
        return out.transpose(-2, -3).flatten(-2)


@torch.no_grad()
def test_tokens_are_not_taken_for_an_image() -> None:
    part = nn.Sequential(Unshaped()).eval()
    check(part, lambda: part(TOKENS), TOKENS, sites=1)


@pytest.mark.parametrize("form", [lambda x: x, lambda x: {"src": x}, lambda x: (x,)])
@torch.no_grad()
def test_encoder_of_torch(form: Any) -> None:
    part = encoder(batch_first=True)
    check(part, lambda: part(TOKENS), form(TOKENS), sites=2)


@torch.no_grad()
def test_encoder_of_torch_whose_batch_is_the_second_dimension() -> None:
    part, tokens = encoder(), TOKENS.transpose(0, 1)
    check(part, lambda: part(tokens), tokens, sites=2)


@pytest.mark.parametrize("given", [lambda x: {"x": x}, lambda x: (x,), lambda x: x[0]])
@torch.no_grad()
def test_images_by_keyword_by_position_and_alone(vit: Any, given: Any) -> None:
    x = torch.randn(2, 3, 160, 160)
    with sparsiattn.patch(vit, "topk", k=0.25) as patch:
        expected, sites = vit(x), patch.sites
    with sparsiattn.patch(vit, "topk", k=0.25, input=given(x)) as patch:
        assert patch.sites == sites
        assert patch.input_shape == (1, 3, 160, 160)
        assert torch.equal(vit(x), expected)


def test_calls_without_tensors_are_refused(vit: Any) -> None:
    for given in ({}, {"x": 3}):
        with pytest.raises(InvalidOption, match="at least one tensor"):
            sparsiattn.patch(vit, "topk", input=given)


def test_a_call_that_the_model_does_not_take(vit: Any) -> None:
    for given in ({"pixels": torch.randn(1, 3, 160, 160)}, torch.randn(7, 5, 3)):
        with pytest.raises(SparsiattnError, match="does not run with this input=") as caught:
            sparsiattn.patch(vit, "topk", input=given)
        assert "Pass input=" not in str(caught.value)


COPIES = [copy.deepcopy, lambda part: pickle.loads(pickle.dumps(part))]


@pytest.mark.parametrize("copied", COPIES, ids=["deepcopy", "pickle"])
@pytest.mark.parametrize(
    "options", [{"strategy": "topk", "k": 0.25}, {"strategy": "token_drop", "keep": 0.5}], ids=str
)
@torch.no_grad()
def test_a_copy_of_a_part_is_unpatched_and_patched_anew(
    vit: Any, copied: Any, options: Any
) -> None:
    dense = vit.blocks(TOKENS)
    with sparsiattn.patch(vit, **options) as patch:
        part = nn.Sequential(*copied(vit.blocks))
        assert sparsiattn.unpatch(part) is part
        assert torch.equal(part(TOKENS), dense)
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in part.modules())
        assert sparsiattn.patch_of(vit) is patch
        check(part, lambda: part(TOKENS), TOKENS, sites=6)


@torch.no_grad()
def test_unpatching_leaves_patches_of_others_alone(vit: Any) -> None:
    with sparsiattn.patch(vit, "topk", k=0.25) as patch:
        ensemble = nn.Sequential(copy.deepcopy(vit))
        sparsiattn.unpatch(ensemble)
        assert sparsiattn.patch_of(ensemble[0]) is not None
        sparsiattn.unpatch(vit.blocks)
        assert sparsiattn.patch_of(vit) is patch


transformers = pytest.importorskip("transformers")


def qwen2() -> nn.Module:
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen

    config = qwen.Qwen2_5_VLVisionConfig(
        depth=3, hidden_size=32, intermediate_size=64, num_heads=2, patch_size=4, window_size=16,
        out_hidden_size=32, fullatt_block_indexes=[1],
    )  # fmt: skip
    return qwen.Qwen2_5_VisionTransformerPretrainedModel(config)


def qwen3() -> nn.Module:
    from transformers.models.qwen3_vl import modeling_qwen3_vl as qwen

    config = qwen.Qwen3VLVisionConfig(
        depth=3, hidden_size=32, intermediate_size=64, num_heads=2, patch_size=4,
        out_hidden_size=32, deepstack_visual_indexes=[1], num_position_embeddings=64,
    )  # fmt: skip
    return qwen.Qwen3VLVisionModel(config)


def packed(*grids: tuple[int, int, int]) -> dict[str, Tensor]:
    grid = torch.tensor(grids)
    generator = torch.Generator().manual_seed(1)
    patches = torch.randn(int(grid.prod(1).sum()), 96, generator=generator)
    return {"hidden_states": patches, "grid_thw": grid}


@pytest.mark.parametrize("build", [qwen2, qwen3])
@torch.no_grad()
def test_packed_images_with_grids_beside_them(build: Any) -> None:
    torch.manual_seed(0)
    tower, call = build().eval(), packed((1, 8, 8), (1, 8, 8))
    dense = tower(**call).last_hidden_state
    with strongest_keys(0.25):
        expected = tower(**call).last_hidden_state
    options: dict[str, Any] = {"k": 0.25, "prefix_keys": False, "tile": 1}
    with sparsiattn.patch(tower, "topk", input=call, **options) as patch:
        assert len(patch.sites) == 3
        assert all(site.placed and site.packed for site in patch.sites)
        torch.testing.assert_close(tower(**call).last_hidden_state, expected)
        one = {"hidden_states": call["hidden_states"][:64], "grid_thw": call["grid_thw"][:1]}
        first = tower(**one).last_hidden_state
        torch.testing.assert_close(first, expected[:64])
        assert patch.report().macs < patch.report().macs_dense
    assert torch.equal(tower(**call).last_hidden_state, dense)


@pytest.mark.parametrize("strategy", ["token_drop", "token_merge"])
@pytest.mark.parametrize("build", [qwen2, qwen3])
def test_packed_images_lose_no_tokens(build: Any, strategy: str) -> None:
    with pytest.raises(InvalidOption, match="into one sequence"):
        sparsiattn.patch(build().eval(), strategy, input=packed((1, 8, 8)))


@torch.no_grad()
def test_a_patch_made_with_a_call_is_loaded_with_one(tmp_path: Path) -> None:
    tower, call = qwen3().eval(), packed((1, 8, 8))
    with sparsiattn.patch(tower, "topk", k=0.25, input=call) as patch:
        expected = tower(**call).last_hidden_state
        patch.save(tmp_path)
    with pytest.raises(InvalidOption, match="input= to load"):
        sparsiattn.load(tower, tmp_path)
    with sparsiattn.load(tower, tmp_path, input=call):
        assert torch.equal(tower(**call).last_hidden_state, expected)
