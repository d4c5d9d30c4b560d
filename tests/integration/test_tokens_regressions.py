"""Faults that were found once in token strategies, each kept from coming back."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
import torch.nn.utils.parametrize as parametrize
from torch import Tensor, nn

import sparsiattn
from tests.support import hosts, zoo


def test_training_does_not_hold_on_to_what_blocks_were_given() -> None:
    model = zoo._vit(depth=4).train()
    live = sparsiattn.patch(model, "token_drop", keep=0.5, layers=[1])
    for _ in range(4):
        model(torch.randn(2, 3, 32, 32)).sum().backward()
        gc.collect()
        for block in live.blocks:
            assert len(block.entered) <= 1
            assert len(block.inside) <= 1


def test_what_a_hook_makes_of_a_blocks_output_goes_on() -> None:
    model: Any = zoo._vit(depth=4).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad(), sparsiattn.patch(model, "token_drop", keep=0.5, layers=[1]):
        before = model.forward_features(x)
        hook = model.blocks[2].register_forward_hook(lambda _, __, out: out * 3 + 1)
        assert not torch.allclose(model.forward_features(x)[:, :1], before[:, :1])
        hook.remove()
        assert torch.equal(model.forward_features(x), before)


def test_nothing_of_a_forward_that_raised_is_used_by_the_next() -> None:
    model: Any = zoo._vit(depth=4).eval()

    def fail(*_: object) -> None:
        raise RuntimeError("on purpose")

    with torch.no_grad(), sparsiattn.patch(model, "token_drop", keep=0.5, layers=[1]):
        hook = model.blocks[3].attn.register_forward_hook(fail)
        with pytest.raises(RuntimeError, match="on purpose"):
            model.forward_features(torch.randn(2, 3, 32, 32))
        hook.remove()
        with pytest.raises(sparsiattn.ModelChanged, match="ran on its own"):
            model.blocks[3](torch.zeros(2, 65, 48))


def test_a_replica_runs_inside_itself() -> None:
    """`nn.DataParallel` copies the instance, whose own features are not an outside call."""
    model: Any = zoo.build("vit")
    x = zoo.images(model)
    with torch.no_grad(), sparsiattn.patch(model, "token_drop", keep=0.3, layers=[0]):
        exact = model(x)
        replica = model._replicate_for_data_parallel()
        for name, module in model._modules.items():
            replica._modules[name] = module
        for name, parameter in model._parameters.items():
            setattr(replica, name, parameter)
        torch.testing.assert_close(replica(x), exact)


def test_a_forward_set_on_the_instance() -> None:
    model: Any = zoo.build("vit")
    x = zoo.images(model)
    model.forward = model.forward
    with torch.no_grad(), sparsiattn.patch(model, "token_drop", keep=0.3, restore=None):
        assert model(x).shape == (2, 5)


def test_a_class_derived_after_patching_survives_unpatch() -> None:
    model: Any = zoo.build("vit")
    x = zoo.images(model)

    class Same(nn.Module):
        def forward(self, value: Tensor) -> Tensor:
            return value

    with torch.no_grad():
        dense = model(x)
        live = sparsiattn.patch(model, "token_drop", keep=0.3)
        parametrize.register_parametrization(model, "pos_embed", Same())
        live.unpatch()
        assert torch.equal(model(x), dense)


@pytest.mark.parametrize(
    "options", [{"strategy": "token_merge"}, {"strategy": "token_drop", "keep": "adaptive"}]
)
def test_plain_averages_of_uneven_tokens_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(sparsiattn.InvalidOption, match="restore='auto'"):
        sparsiattn.patch(zoo.build("vit"), restore=None, **options)


def test_hybrid_attends_sparsely_while_learned_scores_train() -> None:
    model = zoo.build("vit").train()
    tokens = {"name": "token_drop", "version": 1, "options": {"score": "learned", "layers": [0]}}
    live = sparsiattn.patch(model, "hybrid", k=0.2, tokens=tokens, only_if_faster=False)
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    assert all(runtime.last_choice is not None for runtime in live.runtimes)
    planner: Any = live.blocks[0].planner
    assert torch.isfinite(planner.decide[0].weight.grad).all()


def test_source_speaks_of_the_last_forward_only() -> None:
    model = zoo.build("vit")
    with torch.no_grad(), sparsiattn.patch(model, "token_drop", keep=1.0) as live:
        model(torch.randn(3, 3, 32, 32))
        assert live.source().shape == (3, 65)
        with live.disabled():
            model(torch.randn(1, 3, 32, 32))
        with pytest.raises(sparsiattn.InvalidOption, match="last forward pass"):
            live.source()
    swin = zoo.build("swin")
    with torch.no_grad(), sparsiattn.patch(swin, "token_drop", score="norm") as live:
        swin(zoo.images(swin))
        with pytest.raises(sparsiattn.InvalidOption, match="keeps its position"):
            live.source()


def test_hierarchies_check_counts_and_count_their_reductions() -> None:
    model = zoo.build("swin")
    with pytest.raises(sparsiattn.InvalidOption, match="1000000 exceeds"):
        sparsiattn.patch(model, "token_drop", score="norm", keep=10**6)
    with sparsiattn.patch(model, "token_drop", score="learned", keep=0.5) as live:
        report = live.report()
    assert report.predictor_macs > 0
    assert report.macs is not None
    assert report.macs - report.predictor_macs < report.macs_dense


def test_a_kernel_by_name_does_not_stand_in_the_way_of_packed_images() -> None:
    model = zoo.build("vit")
    x = zoo.images(model)
    options: dict[str, Any] = {"keep": "adaptive", "layers": [0]}
    with torch.no_grad():
        with sparsiattn.patch(model, "token_drop", **options):
            exact = model(x)
        with sparsiattn.patch(model, "token_drop", kernel="gather", **options):
            torch.testing.assert_close(model(x), exact)


def test_functional_calls_under_grad() -> None:
    model = zoo.build("vit")
    x = zoo.images(model)
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def loss(values: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, values, (x,)).square().sum()

    with sparsiattn.patch(model, "token_merge", r=5):
        found = torch.func.grad(loss)(weights)
        model(x).square().sum().backward()
    torch.testing.assert_close(found["head.weight"], model.head.weight.grad)


def test_a_transformers_model_inside_another_gives_whole_hidden_states() -> None:
    model: Any = hosts.build("vit")
    with torch.no_grad(), sparsiattn.patch(model, "token_drop", keep=0.5, layers=[0]):
        states = model.vit(hosts.images(), output_hidden_states=True).hidden_states
    assert {h.shape[1] for h in states} == {65}
