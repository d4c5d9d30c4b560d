"""Patterns that a named kernel refuses, and strategies that are wrong: one clear error each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

import sparsiattn
from sparsiattn import AttentionInputs, KernelRefused, Pattern, SparsiattnError, Strategy
from sparsiattn.testing import temporary_plugin
from tests.support import zoo
from tests.support.refusals import SITES, fits, refused, untouched


@pytest.fixture
def model() -> nn.Module:
    """Attention written out by hand until a patch switches it: more that must be put back."""
    return zoo.build("vit_unfused")


@dataclass(frozen=True)
class Positive(Strategy):
    """Pairs with a positive logit: a mask, so nothing that gathers keys can compute it."""

    name = "positive"

    def plan(self, inputs: AttentionInputs) -> Pattern:
        return Pattern.mask(inputs.logits() > 0)


@dataclass(frozen=True)
class Faulty(Strategy):
    """Wrong in the way that ``fault`` says."""

    name = "faulty"
    fault: str = "planner"

    def planner(self, site: sparsiattn.Site) -> Any:
        if self.fault == "planner" and site.index == 1:
            raise ZeroDivisionError("in planner")
        return super().planner(site)

    def plan(self, inputs: AttentionInputs) -> Any:
        if self.fault == "tensor":
            return inputs.logits() > 0
        return Pattern.top(inputs.logits()[..., :-1], 0.5)


class TestKernels:
    def test_named_kernel_refuses_and_never_falls_back(self, model: nn.Module) -> None:
        """Known at patch time, so said there, with the model untouched."""
        with untouched(model), temporary_plugin(strategies=[Positive]):
            with pytest.raises(KernelRefused) as caught:
                sparsiattn.patch(model, "positive", kernel="gather")
            says = (
                "gather: needs key lists, got a Mask",
                SITES[0],
                "kernel='auto'",
                "torch.float32",
            )
            fits(caught.value, RuntimeError, says)
            assert "sdpa" not in str(caught.value)

    def test_refusal_at_patch_time(self, model: nn.Module) -> None:
        with temporary_plugin(strategies=[Positive]):
            says = ("gather: needs key lists", SITES[0])
            options = {"strategy": "positive", "kernel": "gather", "only_if_faster": True}
            refused(model, RuntimeError, says, **options)

    def test_auto_takes_another(self, model: nn.Module) -> None:
        with temporary_plugin(strategies=[Positive]), sparsiattn.patch(model, "positive") as live:
            model(torch.randn(1, 3, 32, 32))
            choice = live.runtimes[0].last_choice
        assert choice is not None
        assert choice.kernel.name != "gather"
        assert dict(choice.refusals)["gather"] == ("needs key lists, got a Mask pattern",)

    @pytest.mark.parametrize("kernel", ["gather", "sdpa"])
    def test_host_mask_that_a_kernel_cannot_serve(self, kernel: str) -> None:
        """Swin's shifted windows give every query its own summary keys."""
        model = zoo.build("swin")
        refused = pytest.raises(KernelRefused, match=f"{kernel}: the model's mask makes")
        with untouched(model, zoo.images(model)), refused:
            sparsiattn.patch(model, "topk", k=0.25, background=2, kernel=kernel)


class TestFaultyStrategies:
    def test_a_planner_that_raises_leaves_the_model_alone(self, model: nn.Module) -> None:
        with untouched(model), pytest.raises(ZeroDivisionError, match="in planner"):
            sparsiattn.patch(model, Faulty())

    def _error(self, model: nn.Module, strategy: Strategy, kind: type[Exception]) -> Exception:
        """What a forward pass of the patched model raises."""
        x = torch.randn(1, 3, 32, 32)
        with untouched(model), sparsiattn.patch(model, strategy), pytest.raises(kind) as caught:
            model(x)
        return caught.value

    def test_a_pattern_of_the_wrong_size(self, model: nn.Module) -> None:
        error = self._error(model, Faulty(fault="size"), SparsiattnError)
        fits(error, ValueError, (SITES[0], "65 keys", "over 64"))

    def test_a_plan_that_is_no_pattern(self, model: nn.Module) -> None:
        error = self._error(model, Faulty(fault="tensor"), SparsiattnError)
        fits(error, TypeError, ("Pattern", "Tensor"))

    def test_a_strategy_that_plans_nothing(self, model: nn.Module) -> None:
        error = self._error(model, Strategy(), NotImplementedError)
        assert "must override plan(inputs)" in str(error)


@pytest.mark.parametrize("leaf", SparsiattnError.__subclasses__(), ids=lambda leaf: leaf.__name__)
def test_every_leaf_is_exported_and_is_a_builtin_error_too(leaf: type[SparsiattnError]) -> None:
    assert getattr(sparsiattn, leaf.__name__) is leaf
    builtin = (LookupError, ValueError, TypeError, RuntimeError, OSError, ArithmeticError)
    assert issubclass(leaf, builtin)
