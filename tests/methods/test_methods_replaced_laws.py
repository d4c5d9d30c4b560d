"""What forward passes survive whose attention is replaced, and what is refused."""

from __future__ import annotations

import threading
from contextlib import nullcontext
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import sparsiattn
from sparsiattn.kernels import Reference
from sparsiattn.methods.attention_reuse import AttentionReuse
from sparsiattn.methods.hypergraph import Hypergraph
from sparsiattn.methods.linformer import Linformer
from sparsiattn.methods.lowrank import LowRank
from sparsiattn.methods.skipat import SkipAt
from sparsiattn.runtime import MODEL_CALL
from sparsiattn.strategies import Hybrid, Strategy, TokenDrop
from sparsiattn.testing import random_inputs, tiny_images, tiny_vit
from tests.support import zoo

ALL: list[Strategy] = [
    Linformer(k=0.25),
    LowRank(rank=0.5),
    Hypergraph(k=0.25),
    AttentionReuse(layers=[1, 2], rank=3),
    SkipAt(),
]
CARRY: list[Strategy] = [AttentionReuse(layers=[1, 2]), SkipAt(parametric=False)]


def by_name(strategy: Strategy) -> str:
    return strategy.name


def slow_but(strategies: list[Strategy], *quick: str) -> list[Any]:
    """Strategies as parameters, all but the named ones in the slow run."""
    return [
        pytest.param(s, id=s.name, marks=() if s.name in quick else pytest.mark.slow)
        for s in strategies
    ]


def gradients(model: Any, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(x).square().sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


class TestForwardPasses:
    """What blocks of one forward pass leave each other."""

    @pytest.mark.parametrize("strategy", ALL, ids=by_name)
    def test_planner_weights_get_gradients(self, strategy: Strategy) -> None:
        model = tiny_vit(depth=4).train()
        with sparsiattn.patch(model, strategy):
            planners = [p for n, p in model.named_parameters() if ".sparsiattn." in n]
            assert planners
            for weight in planners:
                weight.requires_grad_(True)
            model(tiny_images(2)).square().sum().backward()
            assert all(p.grad is not None and p.grad.isfinite().all() for p in planners)
            assert any(p.grad.abs().max() > 0 for p in planners)

    @pytest.mark.parametrize("strategy", ALL, ids=by_name)
    def test_calibration_lowers_the_loss(self, strategy: Strategy) -> None:
        model = tiny_vit(depth=4)
        lr = 3e-4 if strategy.name == "linformer" else 3e-3  # entries of E are small
        with sparsiattn.patch(model, strategy):
            losses = sparsiattn.calibrate(model, [tiny_images(2)], steps=12, lr=lr)
            assert losses[-1] < losses[0]

    @pytest.mark.parametrize("strategy", CARRY, ids=by_name)
    @pytest.mark.parametrize("whole", [True, False])
    def test_checkpointing(self, strategy: Strategy, whole: bool) -> None:
        """Whole blocks run again, or only what is inside their forward; two passes are open."""
        model, x = tiny_vit(depth=4).train(), tiny_images(4)
        with sparsiattn.patch(model, strategy):
            direct = gradients(lambdas(model), x)
            if whole:
                model.set_grad_checkpointing(True)
            else:
                for block in model.blocks:
                    block.forward = checkpointed(block.forward)
            again = gradients(lambdas(model), x)
        assert set(direct) == set(again)
        for name, gradient in again.items():
            torch.testing.assert_close(gradient, direct[name], msg=name)

    @pytest.mark.parametrize("strategy", CARRY, ids=by_name)
    def test_reentrant_checkpoints_are_refused(
        self, strategy: Strategy, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(timm.layers.config, "_USE_REENTRANT_CKPT", True)
        model, x = tiny_vit(depth=4).train(), tiny_images(2).requires_grad_()
        with sparsiattn.patch(model, strategy):
            model.set_grad_checkpointing(True)
            loss = model(x).sum()
            with pytest.raises(sparsiattn.ModelChanged, match="use_reentrant=False"):
                loss.backward()

    @pytest.mark.parametrize("strategy", CARRY, ids=by_name)
    def test_threads_do_not_see_each_other(self, strategy: Strategy) -> None:
        model, inputs = tiny_vit(depth=4), tiny_images(4).split(2)
        with torch.no_grad(), sparsiattn.patch(model, strategy):
            expected = [model(x) for x in inputs]
            wrong: list[str] = []
            barrier = threading.Barrier(2)

            def serve(i: int) -> None:
                barrier.wait()
                with torch.no_grad():
                    for _ in range(15):
                        if not torch.equal(model(inputs[i]), expected[i]):
                            wrong.append(f"thread {i}")

            workers = [threading.Thread(target=serve, args=(i,)) for i in range(2)]
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
        assert not wrong

    @pytest.mark.parametrize("strategy", CARRY, ids=by_name)
    def test_an_exception_half_way_leaves_nothing_behind(self, strategy: Strategy) -> None:
        model, x = tiny_vit(depth=4), tiny_images(2)
        with torch.no_grad():
            dense = model(x)
            live = sparsiattn.patch(model, strategy)
            right = model(x)
            assert MODEL_CALL.cross_layer is None
            broken = model.blocks[1].mlp.register_forward_pre_hook(fail)
            with pytest.raises(ZeroDivisionError):
                model(x.flip(0))
            broken.remove()
            # not through the model's own forward, so only the first site forgets
            torch.testing.assert_close(model.forward_head(model.forward_features(x)), right)
            assert torch.equal(model(x), right)
            with live.disabled():
                assert torch.equal(model(x), dense)
            live.unpatch()
            assert torch.equal(model(x), dense)

    def test_a_block_alone_attends(self) -> None:
        model, x = tiny_vit(depth=4), torch.randn(1, 65, 48)
        with torch.no_grad():
            dense = model.blocks[1](x)
            with sparsiattn.patch(model, SkipAt(layers=[1])):
                torch.testing.assert_close(model.blocks[1](x), dense)

    @pytest.mark.parametrize("strategy", slow_but(ALL, "linformer", "skipat"))
    def test_fewer_tokens(self, strategy: Strategy) -> None:
        """Fixed and adaptive numbers of tokens; images do not see each other's scores."""
        for tokens in (TokenDrop(keep=0.6, layers=[1]), TokenDrop(keep="adaptive", layers=[1])):
            model, x = tiny_vit(depth=4), tiny_images(3)
            both = Hybrid(attention=strategy, tokens=tokens)
            with torch.no_grad(), sparsiattn.patch(model, both, only_if_faster=False):
                together, alone = model(x), torch.cat([model(x[i : i + 1]) for i in range(3)])
                torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("strategy", [*ALL, AttentionReuse(rank="full")], ids=str)
    def test_another_resolution(self, strategy: Strategy) -> None:
        model = tiny_vit(depth=4, dynamic_img_size=True)
        with torch.no_grad(), sparsiattn.patch(model, strategy):
            assert model(torch.randn(2, 3, 48, 32)).isfinite().all()


def fail(*_: object) -> None:
    raise ZeroDivisionError


def lambdas(model: nn.Module) -> nn.Module:
    """Both halves of a batch in two forward passes before one backward pass."""
    return _Halves(model)


class _Halves(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.model(half) for half in x.split(2)])


def checkpointed(call: Any) -> Any:
    from torch.utils.checkpoint import checkpoint

    return lambda x, *rest, **named: checkpoint(call, x, *rest, use_reentrant=False, **named)


@pytest.mark.parametrize("strategy", [CARRY[1], *slow_but([*ALL, CARRY[0]])])
def test_compile_and_export(strategy: Strategy) -> None:
    model, x = tiny_vit(depth=2 if strategy is CARRY[1] else 3), tiny_images(2)
    with torch.no_grad(), sparsiattn.patch(model, strategy):
        exact = model(x)
        torch.compiler.reset()
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x), exact)
        assert MODEL_CALL.cross_layer is None
        torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), exact)
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [*ALL, *CARRY], ids=str)
def test_compile_with_gradient_checkpointing(strategy: Strategy) -> None:
    """Tensors pass between checkpoints: Dynamo wants to be told that the backward pass need not
    see how they were kept."""
    switch = torch._dynamo.config.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=True)
    model, x = tiny_vit(depth=3).train(), tiny_images(2)
    model.set_grad_checkpointing(True)
    with (
        sparsiattn.patch(model, strategy),
        switch if strategy.uses_cross_layer_state else nullcontext(),
    ):
        direct = gradients(model, x)
        torch.compiler.reset()
        again = gradients(torch.compile(model, fullgraph=True, backend="aot_eager"), x)
    for name, gradient in direct.items():
        torch.testing.assert_close(again["_orig_mod." + name], gradient, msg=name)
    torch.compiler.reset()


class TestRefusals:
    @pytest.mark.parametrize("strategy", slow_but(ALL, "lowrank", "skipat"))
    def test_kernels_that_choose_keys_are_refused_by_name(self, strategy: Strategy) -> None:
        model, x = tiny_vit(depth=4), tiny_images(2)
        with pytest.raises(sparsiattn.KernelRefused, match="needs a pattern that selects keys"):
            sparsiattn.patch(model, strategy, kernel="gather")
        outs = []
        for kernel in ("sdpa", "reference"):
            with torch.no_grad(), sparsiattn.patch(model, strategy, kernel=kernel):
                outs.append(model(x))
        torch.testing.assert_close(*outs, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("strategy", ALL, ids=by_name)
    def test_background_has_nothing_to_stand_for(self, strategy: Strategy) -> None:
        with pytest.raises(sparsiattn.InvalidOption, match=r"background must be None for .* got 2"):
            type(strategy)(background=2)

    @pytest.mark.parametrize(
        ("make", "match"),
        [
            (lambda: AttentionReuse(layers=[0]), "site indices >= 1"),
            (lambda: SkipAt(layers=()), "site indices >= 1"),
            (lambda: AttentionReuse(rank=0), "rank must be"),
            (lambda: LowRank(rank=1.5), "rank must be a float"),
            (lambda: LowRank(guide=0), "guide must be"),
            (lambda: Hypergraph(members=0), "members must be"),
            (lambda: sparsiattn.patch(tiny_vit(), SkipAt(layers=[2])), "must be below 2"),
        ],
    )
    def test_options(self, make: Any, match: str) -> None:
        with pytest.raises(sparsiattn.InvalidOption, match=match):
            make()

    @pytest.mark.parametrize("strategy", [Linformer(), Hypergraph()], ids=by_name)
    def test_masks_that_forbid_keys(self, strategy: Strategy) -> None:
        model = zoo.build("swin")
        with pytest.raises(sparsiattn.InvalidOption, match="exclude such sites"):
            sparsiattn.patch(model, strategy)
        assert sparsiattn.patch_of(model) is None
        with sparsiattn.patch(model, strategy, sites=lambda site: site.bias != "mask"):
            assert model(zoo.images(model)).isfinite().all()

    def test_plans_of_wrong_shapes_and_notes_of_strategies_without(self) -> None:
        inputs = random_inputs((4, 4), prefix=1)
        over = sparsiattn.Pattern.computed_keys
        with pytest.raises(sparsiattn.InvalidOption, match=r"k of shape \[2, 3, M, 8\], got"):
            over(inputs, inputs.k[:, :2], inputs.v)
        with pytest.raises(sparsiattn.InvalidOption, match=r"v of shape \[2, 3, 17, 8\]"):
            over(inputs, inputs.k, inputs.v[..., 1:, :])
        with pytest.raises(sparsiattn.InvalidOption, match="without the prefix tokens"):
            over(inputs, inputs.k, inputs.v, q=inputs.q)
        with pytest.raises(sparsiattn.InvalidOption, match="logits of shape"):
            sparsiattn.Pattern.logits(inputs, torch.zeros(1, 1, 1, 17))
        with pytest.raises(sparsiattn.InvalidOption, match="value of shape"):
            sparsiattn.Pattern.output(inputs, inputs.v[:1])
        with pytest.raises(sparsiattn.InvalidOption, match="uses_cross_layer_state = True"):
            inputs.store("scores", inputs.q)

    def test_a_row_of_given_logits_without_a_key_is_zero(self) -> None:
        keep = torch.ones(1, 1, 16, 16, dtype=torch.bool)
        keep[..., 3, :] = False
        inputs = random_inputs((4, 4), prefix=0, bias=keep, kind="mask")
        out = Reference()(inputs, sparsiattn.Pattern.logits(inputs, inputs.q @ inputs.k.mT))
        assert (out[..., 3, :] == 0).all()
        assert out.isfinite().all()


@pytest.mark.parametrize("family", zoo.slow_but(("swin", "vit_differential"), "hiera", "beit"))
def test_other_hosts_reuse_what_fits(family: str) -> None:
    """Stages, windows, position bias, and modules that attend twice."""
    model = zoo.build(family)
    x = zoo.images(model)
    for strategy in CARRY:
        if family == "hiera" and strategy.needs_grid:  # its tokens are in the order of windows
            with pytest.raises(sparsiattn.InvalidOption, match="not in raster order"):
                sparsiattn.patch(model, type(strategy)())
            continue
        with sparsiattn.patch(model, type(strategy)()) as live, torch.no_grad():
            assert model(x).isfinite().all()
            assert live.report().mhsa_macs is not None
