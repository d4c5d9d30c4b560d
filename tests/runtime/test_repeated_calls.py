"""Calls alike leave planning out, and whatever may change the answer brings it back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import sparsiattn
from sparsiattn import AttentionInputs, Pattern
from sparsiattn.kernels import cost
from sparsiattn.runtime.patch_state import state_of
from sparsiattn.runtime.repeated_calls import RepeatedCalls
from sparsiattn.strategies.connectivity import ConnectivityPlanner
from sparsiattn.strategies.topk import TopK

pytestmark = [
    pytest.mark.usefixtures("compiled_native"),
    pytest.mark.filterwarnings("ignore::sparsiattn.errors.SlowerThanDense"),
]


def make() -> nn.Module:
    model = timm.create_model(
        "vit_tiny_patch16_224", depth=2, img_size=96, num_classes=3, dynamic_img_size=True
    )
    return model.eval()  # type: ignore[no-any-return]


def site_of(model: nn.Module) -> Any:
    state = state_of(model)
    assert state is not None
    return state.runtimes[0]


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the sites that planned, in order."""
    names: list[str] = []
    for kind in (TopK, ConnectivityPlanner):
        method = "plan" if kind is TopK else "forward"
        original = getattr(kind, method)

        def plan(self: Any, inputs: AttentionInputs, original: Any = original) -> Pattern:
            names.append(inputs.site.name)
            return original(self, inputs)  # type: ignore[no-any-return]

        monkeypatch.setattr(kind, method, plan)
    return names


@pytest.mark.parametrize("strategy", ["topk", "connectivity"])
def test_a_call_alike_is_not_planned_and_gives_what_planning_gives(
    strategy: str, planned: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make()
    images = [torch.randn(b, 3, s, s) for b, s in ((1, 96), (2, 96), (1, 64), (1, 96), (2, 96))]
    with sparsiattn.patch(model, strategy, k=0.3), torch.no_grad():
        first = [model(x) for x in images]
        planned.clear()
        again = [model(x) for x in images]
        assert planned == []
        monkeypatch.setattr(RepeatedCalls, "run", lambda *_: None)
        exact = [model(x) for x in images]
        assert len(planned) == 10
    for a, b, c in zip(first, again, exact, strict=True):
        assert torch.equal(a, c)
        assert torch.equal(b, c)


def test_the_kernel_of_the_call_at_hand_is_noted(planned: list[str]) -> None:
    model, small, large = make(), torch.randn(1, 3, 64, 64), torch.randn(1, 3, 96, 96)
    with sparsiattn.patch(model, "topk", k=0.3), torch.no_grad():
        for x in (small, large, small):
            model(x)
        site = site_of(model)
        assert site.last_choice is not None
        assert site.last_choice.call.keys == 17


def _with_mode(model: nn.Module, x: Tensor) -> None:
    with FlopCounterMode(display=False):
        model(x)


def _with_gradient(model: nn.Module, x: Tensor) -> None:
    with torch.enable_grad():
        model(x)


def _with_autocast(model: nn.Module, x: Tensor) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        model(x)


def _with_observer(model: nn.Module, x: Tensor) -> None:
    seen: list[str] = []
    with site_of(model).owner.observing(lambda site, planner, inputs: seen.append(site.name)):
        model(x)
    assert len(seen) == 2
    model(x.repeat(2, 1, 1, 1))  # which plans


def _with_new_prices(model: nn.Module, x: Tensor) -> None:
    cost.reload()
    model(x)


@pytest.mark.parametrize(
    "changed", [_with_mode, _with_gradient, _with_autocast, _with_observer, _with_new_prices]
)
def test_what_may_change_the_answer_brings_planning_back(changed: Any, planned: list[str]) -> None:
    model, x = make(), torch.randn(1, 3, 96, 96)
    with sparsiattn.patch(model, "topk", k=0.3), torch.no_grad():
        model(x)
        planned.clear()
        changed(model, x)
        assert planned


def test_disabled_and_unpatched_models_are_dense() -> None:
    model, x = make(), torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        dense = model(x)
        with sparsiattn.patch(model, "topk", k=0.3) as live:
            sparse = model(x), model(x)
            with live.disabled():
                assert torch.equal(model(x), dense)
            assert torch.equal(model(x), sparse[1])
        assert torch.equal(sparse[0], sparse[1])
        assert not torch.equal(sparse[1], dense)
        assert torch.equal(model(x), dense)


def test_weights_written_without_a_trace_are_seen(planned: list[str]) -> None:
    """A predictor that is fitted between two calls ranks from the next one on."""
    model, x = make(), torch.randn(1, 3, 96, 96)
    with sparsiattn.patch(model, "connectivity", k=0.3), torch.no_grad():
        by_logits = model(x), model(x)
        for runtime in state_of(model).runtimes:  # type: ignore[union-attr]
            runtime.planner.up.data.copy_(torch.randn_like(runtime.planner.up))
        by_predictor = model(x)
    assert torch.equal(*by_logits)
    assert not torch.equal(by_predictor, by_logits[0])


@dataclass(frozen=True)
class ByValue(TopK):
    """Plans by what the queries are."""

    name = "by_value"

    def plan(self, inputs: AttentionInputs) -> Pattern:
        if inputs.q.mean() > 0:
            return super().plan(inputs)
        return Pattern.dense(inputs.n_queries, inputs.n_keys)


def test_a_plan_of_ones_own_is_made_anew_in_every_call() -> None:
    assert not ByValue.plans_by_shape
    model, x = make(), torch.randn(1, 3, 96, 96)
    with sparsiattn.patch(model, ByValue(k=0.3)), torch.no_grad():
        model(x)
        assert not site_of(model).repeated.known


def test_nothing_of_a_call_is_kept_alive() -> None:
    from weakref import ref

    model = make()
    seen: list[Any] = []
    model.blocks[0].attn.register_forward_pre_hook(lambda m, a: seen.append(ref(a[0])))
    with sparsiattn.patch(model, "topk", k=0.3), torch.no_grad():
        x = torch.randn(1, 3, 96, 96)
        model(x)
        assert site_of(model).repeated.known
        assert seen[0]() is None
