"""Faults that a review found, each reproduced first."""

from __future__ import annotations

import copy
import threading

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right

import sparsiattn
from sparsiattn.attention import AttentionInputs, Site
from sparsiattn.strategies import Planner
from sparsiattn.testing import temporary_plugin
from tests.support import zoo


class _Interrupted(nn.Module):
    def forward(self, *_: object) -> torch.Tensor:
        raise KeyboardInterrupt


def test_an_interrupt_does_not_outlive_the_patch() -> None:
    """torch calls no hook for KeyboardInterrupt, so the scope stays open."""
    model, x = zoo.build("vit"), torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        dense = model(x)
        live = sparsiattn.patch(model, k=0.1)
        sparse = model(x)
        projection, model.blocks[0].attn.proj = model.blocks[0].attn.proj, _Interrupted()
        with pytest.raises(KeyboardInterrupt):
            model(x)
        model.blocks[0].attn.proj = projection
        assert torch.equal(model(x), sparse)
        live.unpatch()
        assert torch.equal(model(x), dense)


def test_masks_that_are_tensor_subclasses_still_work() -> None:
    q, k = torch.randn(1, 1, 4, 8), torch.randn(1, 1, 6, 8)
    bias = causal_lower_right(4, 6)
    mask = torch.ones(4, 6, dtype=torch.bool).tril(2)
    with sparsiattn.patch(zoo.build("vit"), k=0.1):
        out = F.scaled_dot_product_attention(q, k, k, attn_mask=bias)
        torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, k, attn_mask=mask))


@pytest.mark.skipif("attn_mask" not in timm.models.VisionTransformer.forward.__code__.co_varnames,
                    reason="this timm takes no mask")  # fmt: skip
@pytest.mark.parametrize("strategy", ["connectivity", "local"])
def test_a_float_mask_that_only_comes_at_run_time(strategy: str) -> None:
    model, x = zoo.build("vit"), torch.randn(1, 3, 32, 32)
    keep = (torch.rand(65, 65) > 0.5) | torch.eye(65).bool()
    additive = torch.zeros(65, 65).masked_fill(~keep, float("-inf"))
    with torch.no_grad(), sparsiattn.patch(model, strategy, k=0.25):
        exact = model(x, attn_mask=keep)
        assert torch.isfinite(exact).all()
        torch.testing.assert_close(model(x, attn_mask=additive), exact, rtol=1e-4, atol=1e-5)


def test_a_site_that_no_longer_calls_attention_is_an_error() -> None:
    model, x = zoo.build("vit"), torch.randn(1, 3, 32, 32)
    with torch.no_grad(), sparsiattn.patch(model, k=0.25) as live:
        model.blocks[1].attn.fused_attn = False
        with pytest.raises(sparsiattn.ModelChanged, match=r"blocks\.1\.attn.*fused_attn"):
            model(x)
        with live.disabled():
            model(x)


def test_an_original_that_was_put_back_is_wrapped_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = zoo.build("vit"), torch.randn(1, 3, 32, 32)
    with torch.no_grad(), sparsiattn.patch(model, k=0.25):
        sparse = model(x)
        monkeypatch.setattr(
            F, "scaled_dot_product_attention", torch._C._nn.scaled_dot_product_attention
        )
        assert torch.equal(model(x), sparse)


class _TwoCalls(nn.Module):
    """Two attentions in one module, over all keys and over pooled ones."""

    def __init__(self, pool: int) -> None:
        super().__init__()
        self.embed, self.pool = nn.Conv2d(3, 8, 1), pool

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.embed(images).flatten(2).mT.unsqueeze(1)
        y = 3 * x.flip(-2)[..., :: self.pool, :]
        return F.scaled_dot_product_attention(3 * x, x, x) + F.scaled_dot_product_attention(x, y, y)


def test_two_attentions_of_one_module() -> None:
    with pytest.raises(sparsiattn.NothingToPatch, match="2 calls of attention with different"):
        sparsiattn.patch(_TwoCalls(4), "topk", input=(1, 3, 8, 8))
    model, x = _TwoCalls(1), torch.randn(1, 3, 8, 8)
    with torch.no_grad(), sparsiattn.patch(model, "topk", k=0.3, input=x):
        tokens = model.embed(x).flatten(2).mT.unsqueeze(1)
        expected = sum(_top(q, k) for q, k in ((3 * tokens, tokens), (tokens, 3 * tokens.flip(-2))))
        torch.testing.assert_close(model(x), expected)


def _top(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    logits = q @ k.mT / q.shape[-1] ** 0.5
    least = logits.topk(20).values[..., -1:]
    return logits.masked_fill(logits < least, float("-inf")).softmax(-1) @ k


def test_patches_that_are_not_square() -> None:
    for patch_size, grid in (((2, 4), (16, 8)), ((8, 2), (4, 16))):
        model = timm.models.VisionTransformer(**{**zoo.TINY, "patch_size": patch_size}).eval()
        with sparsiattn.patch(model, "local", k=0.25) as live:
            assert live.sites[0].grid == grid
            assert _grids(live, torch.randn(1, 3, 32, 32)) == [grid, grid]


def _grids(live: sparsiattn.Patch, x: torch.Tensor) -> list[tuple[int, int]]:
    seen: list[tuple[int, int]] = []

    def observe(site: Site, planner: Planner, inputs: AttentionInputs) -> None:
        seen.append(inputs.query_grid)

    with live.observing(observe), torch.no_grad():
        live.model(x)
    return seen


def test_swins_window_after_set_input_size() -> None:
    model = zoo.build("swin")
    with sparsiattn.patch(model, "local", k=0.25) as live:
        model.set_input_size((128, 64), window_size=(8, 4))
        assert set(_grids(live, torch.randn(1, 3, 128, 64))) == {(8, 4)}


def test_a_part_of_a_patched_model_cannot_be_patched_again() -> None:
    inner = zoo.build("vit")
    with (
        sparsiattn.patch(nn.Sequential(inner), k=0.2, input=(1, 3, 32, 32)),
        pytest.raises(sparsiattn.AlreadyPatched),
    ):
        sparsiattn.patch(inner, k=0.2)


def test_channel_attention_is_left_alone() -> None:
    model = timm.create_model("xcit_nano_12_p16_224", depth=2, num_classes=5).eval()
    with pytest.raises(sparsiattn.NothingToPatch):
        sparsiattn.patch(model, "topk")
    assert not any(getattr(m, "fused_attn", False) for b in model.blocks for m in b.modules())


def test_a_copy_made_while_disabled_or_observed_is_a_patched_model() -> None:
    model = zoo.build("swin")
    x = zoo.images(model)
    with torch.no_grad(), sparsiattn.patch(model, "topk", k=0.25) as live:
        sparse = model(x)
        with live.disabled():
            twin = copy.deepcopy(model)
        assert torch.equal(twin(x), sparse)
        with live.observing(lambda *_: None):
            twin = copy.deepcopy(model)
            assert torch.equal(twin(x), sparse)


def test_report_and_save_follow_set_input_size(tmp_path: object) -> None:
    model = zoo.build("vit")
    with sparsiattn.patch(model, "topk", k=0.25) as live:
        small = live.report()
        model.set_input_size((64, 64))
        large = live.report()
        assert large.input_shape == (1, 3, 64, 64)
        assert large.mhsa_macs_dense > 10 * small.mhsa_macs_dense
        live.save(str(tmp_path))
        live.unpatch()
        sparsiattn.load(model, str(tmp_path)).unpatch()


def test_models_that_hold_locks_and_graph_tensors() -> None:
    model = zoo.build("vit")
    model.lock = threading.Lock()
    model.history = {"a": [model.cls_token * 2]}
    with sparsiattn.patch(model, k=0.25):
        model(torch.randn(1, 3, 32, 32))


def test_other_default_dtypes(monkeypatch: pytest.MonkeyPatch) -> None:
    model = zoo.build("vit").double()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.no_grad(), sparsiattn.patch(model, k=0.25, tile=(2, 2)):
            assert torch.isfinite(model(torch.randn(1, 3, 32, 32))).all()
    finally:
        torch.set_default_dtype(torch.float32)


def test_half_models_report_and_inference_mode_patches_train() -> None:
    model = zoo.build("vit").bfloat16()
    with torch.inference_mode():
        live = sparsiattn.patch(model, k=0.25, channels=8)
    assert live.report().predictor_macs > 0
    sparsiattn.calibrate(model, [torch.randn(2, 3, 32, 32).bfloat16()])


def test_calibrate_gives_every_module_its_own_mode_back() -> None:
    model = zoo.build("vit").train()
    model.norm_pre.eval()
    with sparsiattn.patch(model, k=0.25, scores="predictor"):
        sparsiattn.calibrate(model, [torch.randn(2, 3, 32, 32)])
        assert model.training
        assert not model.norm_pre.training
        with pytest.raises(sparsiattn.InvalidOption, match="no images"):
            sparsiattn.calibrate(model, [])


def test_a_budget_spent_on_prefix_tokens_is_named() -> None:
    model = timm.models.VisionTransformer(**zoo.TINY, reg_tokens=8)
    with sparsiattn.patch(model, "topk", k=0.1) as live:
        assert "prefix tokens use up the budget" in str(live.report())


def test_observers_stay_in_their_thread() -> None:
    model, x = zoo.build("vit"), torch.randn(1, 3, 32, 32)
    seen: list[torch.Tensor] = []
    with torch.no_grad(), sparsiattn.patch(model, k=0.1) as live:
        sparse = model(x)
        with live.observing(lambda *_: None):
            worker = threading.Thread(target=lambda: seen.append(model(x).detach()))
            worker.start()
            worker.join()
    assert torch.equal(seen[0], sparse)


def test_backbones_of_plugins_are_asked_before_the_one_that_takes_every_model() -> None:
    class Mine(sparsiattn.Backbone):
        name = "mine"

        def why_not(self, model: nn.Module) -> list[str]:
            return [] if isinstance(model, timm.models.VisionTransformer) else ["not mine"]

    model = zoo.build("vit")
    with temporary_plugin(backbones=[Mine()]):
        assert next(iter(sparsiattn.list_backbones())) == "mine"
        with sparsiattn.patch(model, "local") as live:
            assert live.backbone == "mine"
    with sparsiattn.patch(model, "local") as live:
        assert live.backbone != "mine"
