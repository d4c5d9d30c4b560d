"""Biases of decomposed relative positions are not built, and nothing else changes."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from timm.models.vision_transformer_sam import VisionTransformerSAM
from torch import Tensor, nn
from torch.nn import functional as F

import sparsiattn
from sparsiattn.attention.factored_bias import LEAST, FactoredBias
from sparsiattn.runtime.lifting import sums

pytestmark = pytest.mark.usefixtures("compiled_native")

SIZES: dict[str, Any] = {
    "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 256,
}  # fmt: skip
IMAGES = torch.randn(2, 3, 256, 256, generator=torch.Generator().manual_seed(0))


def timm_sam() -> nn.Module:
    return VisionTransformerSAM(
        img_size=256, depth=2, embed_dim=24, num_heads=2, use_rel_pos=True, window_size=14,
        global_attn_indexes=(1,), num_classes=0, neck_chans=16,
    )  # fmt: skip


def sam(attention: str) -> nn.Module:
    config = transformers.SamVisionConfig(
        **SIZES, mlp_dim=48, global_attn_indexes=[1], output_channels=16,
        attn_implementation=attention,
    )  # fmt: skip
    return transformers.SamVisionModel(config)


def vitdet() -> nn.Module:
    config = transformers.VitDetConfig(
        **SIZES, use_relative_position_embeddings=True, window_size=8, window_block_indices=[0],
        pretrain_image_size=256,
    )  # fmt: skip
    return transformers.VitDetModel(config)


class ByHand(nn.Module):
    """Attention between patches whose host does more to its bias than any that is known.

    Args:
        more: Done to the bias ``[B, H, N, N]``; returns it.
    """

    def __init__(self, more: Callable[[Tensor], Tensor] = lambda bias: bias) -> None:
        super().__init__()
        self.patches, self.qkv, self.more = nn.Conv2d(3, 24, 16, 16), nn.Linear(24, 72), more
        self.rel_pos_h, self.rel_pos_w = (nn.Parameter(torch.randn(16, 16, 12)) for _ in "hw")
        self.num_heads = 2

    def attention(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 12)).permute(2, 0, 3, 1, 4)
        grid = q.unflatten(-2, (16, 16))
        rows = torch.einsum("bnhwc,hkc->bnhwk", grid, self.rel_pos_h)
        columns = torch.einsum("bnhwc,wkc->bnhwk", grid, self.rel_pos_w)
        bias = self.more((columns.unsqueeze(-2) + rows.unsqueeze(-1)).flatten(-2).flatten(2, 3))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(self.patches(x).flatten(2).mT)


def adds_in_place(bias: Tensor) -> Tensor:
    view = bias.view(2, 1, 2, 256, 256) if len(bias) == 2 else bias[None]
    view += torch.linspace(-1, 1, 256)  # seen through the view
    return bias


HOSTS: dict[str, Callable[[], nn.Module]] = {
    "timm": timm_sam,
    "transformers": lambda: sam("sdpa"),
    "transformers, eager": lambda: sam("eager"),
    "transformers, added to scores": vitdet,
    "by hand": ByHand,
}
OTHERS = {
    "scaled": lambda: ByHand(lambda bias: bias * 0.5),
    "masked": lambda: ByHand(lambda bias: bias.masked_fill(torch.eye(256) > 0, -1.0)),
    "written to": lambda: ByHand(adds_in_place),
    "of half precision": lambda: ByHand(lambda bias: bias.bfloat16().float()),
}


def prepared(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    model = make().eval()
    for name, weight in model.named_parameters():
        if weight.dim() > 1:
            nn.init.normal_(weight, std=0.3 if "rel_pos" in name else 0.1)
    return model


def result(model: nn.Module, images: Tensor = IMAGES) -> Tensor:
    out = model(images)
    return out if isinstance(out, Tensor) else out[0]  # type: ignore[no-any-return]


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Shapes of the large biases that were built after all."""
    shapes, build = [], FactoredBias.built

    def noted(self: FactoredBias) -> Tensor:
        if self.numel() >= LEAST:
            shapes.append(self.shape)
        return build(self)

    monkeypatch.setattr(FactoredBias, "built", noted)
    return shapes


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Shapes of biases of which compiled code read the factors."""
    shapes, factors = [], FactoredBias.factors

    def noted(self: FactoredBias) -> Tensor:
        shapes.append(self.shape)
        return factors(self)

    monkeypatch.setattr(FactoredBias, "factors", noted)
    return shapes


def without_factors(run: Callable[[], Tensor]) -> Tensor:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sums.factors, "serves", lambda a, b: False)
        return run()


@torch.no_grad()
@pytest.mark.parametrize("kernel", ["native", "gather"])
@pytest.mark.parametrize("host", HOSTS)
def test_no_bias_is_built(
    host: str, kernel: str, built: list[torch.Size], read: list[torch.Size]
) -> None:
    model = prepared(HOSTS[host])
    dense = result(model)
    with sparsiattn.patch(model, k=0.1, kernel=kernel, input=IMAGES[:1]) as patch:
        found = result(model)
        if kernel == "native":
            assert built == []
            assert read
        expected = without_factors(lambda: result(model))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert not torch.equal(found, dense)
        with patch.disabled():
            assert torch.equal(result(model), dense)
    assert torch.equal(result(model), dense)


@torch.no_grad()
@pytest.mark.parametrize("host", OTHERS)
def test_what_else_is_done_to_it_counts(host: str) -> None:
    model = prepared(OTHERS[host])
    sparsiattn.patch(model, k=0.1, input=IMAGES[:1])
    found, expected = result(model), without_factors(lambda: result(model))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("host", ["timm", "by hand"])
def test_dense_sites_are_the_hosts_own(host: str) -> None:
    model = prepared(HOSTS[host])
    dense = result(model)
    sparsiattn.patch(model, "dense", input=IMAGES[:1])
    assert torch.equal(result(model), dense)


def test_classes_come_back() -> None:
    model = prepared(timm_sam)
    kinds = [type(module) for module in model.modules()]
    patch = sparsiattn.patch(model, k=0.1, input=IMAGES[:1])
    assert [type(module) for module in model.modules()] != kinds
    patch.unpatch()
    assert [type(module) for module in model.modules()] == kinds


@torch.no_grad()
@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copies_build_none_either(way: str, built: list[torch.Size]) -> None:
    model = prepared(timm_sam)
    sparsiattn.patch(model, k=0.1, kernel="native")
    if way == "deepcopy":
        other = copy.deepcopy(model)
    else:
        torch.save(model, buffer := io.BytesIO())
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    torch.testing.assert_close(result(other), result(model))
    assert built == []


def test_gradients_reach_the_positions() -> None:
    """A pass with gradients builds the bias, which then has one."""
    model = prepared(timm_sam)
    sparsiattn.patch(model, k=0.1, input=IMAGES[:1])
    image = IMAGES[:1]
    result(model, image).square().sum().backward()
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    without_factors(lambda: result(model, image)).square().sum().backward()
    exact = [p.grad for p in model.parameters() if p.grad is not None]
    torch.testing.assert_close(found, exact)
    table = model.get_parameter("blocks.1.attn.rel_pos_h").grad
    assert table is not None
    assert table.any()


@torch.no_grad()
def test_other_sizes_and_batches(built: list[torch.Size]) -> None:
    model = prepared(timm_sam)
    sparsiattn.patch(model, k=0.1, kernel="native")
    for shape in ((1, 3, 256, 256), (3, 3, 224, 320)):
        images = torch.randn(shape)
        found = result(model, images)
        expected = without_factors(lambda images=images: result(model, images))  # type: ignore[misc]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert built == []


@torch.no_grad()
@pytest.mark.slow
def test_compiled_programs_build_it() -> None:
    model = prepared(timm_sam)
    sparsiattn.patch(model, k=0.1, input=IMAGES[:1])
    expected = result(model)
    found = result(torch.compile(model, fullgraph=True))  # type: ignore[arg-type]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
