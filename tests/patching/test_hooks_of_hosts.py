"""Hooks that a model needs to compute what it returns run in a dry run, those of a user do not."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sparsiattn
from sparsiattn import InvalidOption
from tests.support.strongest_keys import SIZE, Blocks, TokenAttention, photos, strongest_keys

transformers = pytest.importorskip("transformers")

SMALL = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": 64}
NECK = {"neck_hidden_sizes": [8] * 4, "fusion_hidden_size": 8}


def dino(*layers: int, **options: Any) -> Any:
    return transformers.Dinov2Config(**SMALL, patch_size=8, out_indices=list(layers), **options)


def backbone() -> nn.Module:
    return transformers.AutoBackbone.from_config(dino(2, 4))


def depth_anything() -> nn.Module:
    config = transformers.DepthAnythingConfig(
        backbone_config=dino(1, 2, 3, 4, reshape_hidden_states=False),
        **NECK,
        reassemble_hidden_size=32,
        patch_size=8,
        head_hidden_size=4,
    )
    return transformers.DepthAnythingForDepthEstimation(config)


def upernet() -> nn.Module:
    options: dict[str, Any] = {"use_auxiliary_head": False, "pool_scales": [1, 2], "num_labels": 3}
    config = transformers.UperNetConfig(backbone_config=dino(2, 4), hidden_size=16, **options)
    return transformers.UperNetForSemanticSegmentation(config)


def dpt() -> nn.Module:
    options: dict[str, Any] = {"backbone_out_indices": [0, 1, 2, 3], "use_auxiliary_head": False}
    config = transformers.DPTConfig(
        **SMALL, **NECK, **options, patch_size=8, intermediate_size=64, num_labels=3,
        reassemble_factors=[1, 1, 1, 0.5],
    )  # fmt: skip
    return transformers.DPTForSemanticSegmentation(config)


def beit() -> nn.Module:
    options: dict[str, Any] = {"use_auxiliary_head": False, "pool_scales": [1, 2], "num_labels": 3}
    config = transformers.BeitConfig(
        **SMALL, **options, patch_size=16, intermediate_size=64, out_indices=[1, 2, 3, 4]
    )
    return transformers.BeitForSemanticSegmentation(config)


def made(build: Callable[[], nn.Module], ran: bool = False) -> nn.Module:
    torch.manual_seed(0)
    model = build().eval()
    if ran:
        model(photos())
    return model


def tensors(output: Any) -> list[Tensor]:
    values = [x for value in output.values() for x in (value if type(value) is tuple else [value])]
    return [value for value in values if isinstance(value, Tensor)]


DENSE_HEADS = [backbone, depth_anything, upernet, dpt, beit]


@pytest.mark.parametrize("ran", [False, True], ids=["never run", "run before"])
@pytest.mark.parametrize("build", DENSE_HEADS)
@torch.no_grad()
def test_models_that_record_by_hooks_are_patched(build: Any, ran: bool) -> None:
    model, x = made(build, ran), photos()
    dense = tensors(model(x))
    with strongest_keys(16, prefix=1):
        expected = tensors(model(x))
    with sparsiattn.patch(model, "topk", k=16, prefix_keys=False, tile=1, input=SIZE) as patch:
        output = tensors(model(x))
        assert patch.report().sites
    assert [o.shape for o in output] == [d.shape for d in dense]
    for sparse, by_hand in zip(output, expected, strict=True):
        torch.testing.assert_close(sparse, by_hand)
    assert not all(map(torch.equal, output, dense))
    assert all(map(torch.equal, tensors(model(x)), dense))


@pytest.mark.parametrize("ran", [False, True], ids=["never run", "run before"])
@pytest.mark.parametrize("options", [{"strategy": "token_drop", "keep": 0.5},
                                     {"strategy": "token_merge", "r": 4}], ids=str)  # fmt: skip
@torch.no_grad()
def test_maps_are_whole_where_tokens_are_fewer(options: Any, ran: bool) -> None:
    model, x = made(backbone, ran), photos()
    plain = transformers.Dinov2Model(dino(2, 4)).eval()
    missing = plain.load_state_dict(model.state_dict(), strict=False).missing_keys
    assert not missing
    with sparsiattn.patch(plain, input=SIZE, **options):
        states = plain(x, output_hidden_states=True).hidden_states
    with sparsiattn.patch(model, input=SIZE, **options):
        maps = model(x).feature_maps
    assert [tuple(m.shape) for m in maps] == [(2, 32, 8, 8)] * 2
    for feature_map, layer in zip(maps, (2, 4), strict=True):
        features = model.layernorm(states[layer])[:, 1:]
        torch.testing.assert_close(feature_map, features.mT.reshape(2, 32, 8, 8))


@pytest.mark.parametrize("build", DENSE_HEADS)
@torch.no_grad()
def test_heads_behind_fewer_tokens_get_whole_maps(build: Any) -> None:
    """With every token kept a token strategy changes nothing, so only restoring is left."""
    model, x = made(build), photos()
    dense = tensors(model(x))
    with sparsiattn.patch(model, "token_drop", keep=[0.9999, 1.0], layers=[1, 2], input=SIZE):
        output = tensors(model(x))
    for sparse, d in zip(output, dense, strict=True):
        torch.testing.assert_close(sparse, d)


def test_restore_none_is_refused_there() -> None:
    with pytest.raises(InvalidOption, match="restore='auto'"):
        sparsiattn.patch(made(backbone), "token_drop", keep=0.5, restore=None, input=SIZE)


def attention(host: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


class Recording(Blocks):
    """Returns the outputs of its blocks, which its own hooks put aside."""

    def __init__(self, style: str) -> None:
        super().__init__(TokenAttention(attention), TokenAttention(attention))
        self.seen: list[Tensor] = []
        for block in self.blocks:
            block.register_forward_hook(getattr(self, style)())

    def forward(self, x: Tensor) -> Tensor:
        self.seen.clear()
        super().forward(x)
        return torch.stack(self.seen)

    def note(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.seen.append(output)

    def method(self) -> Any:
        return self.note

    def closure(self) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            self.seen.append(output)

        return hook

    def closure_over_a_part(self) -> Any:
        seen = self.seen
        return lambda module, args, output: seen.append(output)

    def default(self) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor, *, home: Recording = self) -> None:
            home.seen.append(output)

        return hook

    def partial(self) -> Any:
        return partial(Recording.note, self)


STYLES = ["method", "closure", "closure_over_a_part", "default", "partial"]


@pytest.mark.parametrize("style", STYLES)
@torch.no_grad()
def test_hooks_by_which_a_model_records(style: str) -> None:
    model, x = Recording(style).eval(), photos()
    dense = model(x)
    with strongest_keys(0.25):
        expected = model(x)
    before = [id(tensor) for tensor in model.seen]
    with sparsiattn.patch(model, "topk", k=0.25, input=SIZE):
        assert [id(tensor) for tensor in model.seen] == before
        torch.testing.assert_close(model(x), expected)
    assert torch.equal(model(x), dense)


GLOBAL: list[Any] = []


def of_a_list(model: nn.Module, seen: list[Any]) -> Any:
    return lambda module, args, output: seen.append(output)


def of_its_append(model: nn.Module, seen: list[Any]) -> Any:
    note = seen.append
    return lambda module, args, output: note(output)


def with_the_module(model: Any, seen: list[Any]) -> Any:
    block = model.blocks[0]
    return lambda module, args, output: seen.append((block, output))


def with_the_module_and_a_default(model: Any, seen: list[Any]) -> Any:
    def hook(
        module: Any, args: Any, output: Any, home: Any = model, note: Any = seen.append
    ) -> None:
        note((home, output))

    return hook


def into_a_global(model: nn.Module, seen: list[Any]) -> Any:
    return lambda module, args, output: GLOBAL.append((model, output))


class Recorder:
    def __init__(self, model: nn.Module, seen: list[Any]) -> None:
        self.model, self.seen = model, seen

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        self.seen.append(output)


@pytest.mark.parametrize("kind", [of_a_list, of_its_append, with_the_module, into_a_global,
                                  with_the_module_and_a_default, Recorder])  # fmt: skip
@pytest.mark.parametrize("options", [{}, {"kernel": "sdpa"}], ids=str)
def test_hooks_of_a_user_see_no_dry_run(kind: Any, options: Any) -> None:
    GLOBAL.clear()
    seen: list[Any] = []
    model = Blocks(TokenAttention(attention), TokenAttention(attention)).eval()
    model.blocks[0].register_forward_hook(kind(model, seen))
    with sparsiattn.patch(model, "topk", k=0.25, input=SIZE, **options) as patch:
        patch.report()
        sparsiattn.inspect(model, input=SIZE, strategies=["topk"])
        assert not seen
        assert not GLOBAL
        model(photos())
    assert len(seen) + len(GLOBAL) == 1


def test_a_hook_that_looks_into_a_block_is_named() -> None:
    model = transformers.Dinov2Model(dino(4)).eval()
    kept = model.kept = []  # type: ignore[assignment]

    def hook(module: nn.Module, args: Any, output: Tensor) -> None:
        kept.append(output)

    model.encoder.layer[2].mlp.register_forward_hook(hook)
    with pytest.raises(InvalidOption, match=r"its own hook on 'encoder.layer.2.mlp'"):
        sparsiattn.patch(model, "token_drop", keep=0.5, input=SIZE)
    sparsiattn.patch(model, "topk", k=0.25, input=SIZE).unpatch()
    assert not kept
