"""Less of what ``python benchmarks/reliability`` measures, and the faults that it found."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

import sparsiattn
from sparsiattn import AttentionInputs, InvalidOption, Pattern, Site
from sparsiattn.kernels import Gather, Reference
from sparsiattn.strategies import finish
from sparsiattn.testing import random_inputs, tiny_images, tiny_vit
from tests.support import ROOT

sys.path.append(str(ROOT / "benchmarks"))

from reliability import (
    answers,
    cycles,
    determinism,
    fuzz,
    halves,
    injected,
    kills,
    threads,
)
from reliability.drawn import Case, Given
from reliability.hosts import Host
from reliability.outcomes import Tally, Wrong


@pytest.fixture(autouse=True)
def _one_thread() -> object:
    """Bits are compared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("part", "count"), [("models", 8), ("kernels", 150), ("misuse", 25), ("saved", 4)]
)
def test_drawn_cases(part: str, count: int) -> None:
    tally = getattr(fuzz, part)(count)
    assert tally.cases >= count
    assert not tally.wrong, "\n".join(tally.wrong)


def test_threads() -> None:
    found = threads.run(rounds=1, lanes=8)
    assert found["forwards"] > 50
    assert found["patched_and_unpatched_meanwhile"] == 1
    assert not found["wrong_cases"]


def test_cycles() -> None:
    found = cycles.run(6, forgotten=3, warm=1, kinds=6)
    assert not found["changed_models"]
    assert found["hooks_left"] == found["still_alive"] == 0
    assert abs(found["objects"][2] - found["objects"][1]) < 50


def test_exceptions_at_hook_points() -> None:
    found = injected.run((1, 7), every=40)
    assert found["raised"] > 10
    assert not found["wrong_cases"]


def test_determinism() -> None:
    rows = determinism.digests(2)
    assert all(row["again"] for row in rows.values())
    assert max(row["batch"] for row in rows.values()) < 1e-5
    assert rows == determinism.digests(2)


def test_half_precision() -> None:
    found = halves.run(["connectivity", "attention_reuse"])
    assert not found["wrong_cases"]


@pytest.mark.slow  # a server of processes that has to import torch first
def test_kills() -> None:
    found = kills.run(training=2, saving=4)
    assert found["training"]["kills"] + found["saving"]["kills"] >= 4
    assert found["training"]["wrong"] == found["saving"]["wrong"] == 0


@pytest.mark.slow
def test_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import reliability.__main__ as whole

    written = {}
    monkeypatch.setattr(whole, "write", lambda name, content: written.update({name: content}))
    monkeypatch.setattr(sys, "argv", ["reliability", "--work", str(tmp_path)])
    assert whole.main() == 0
    found = written["reliability-cpu"]
    assert found["fuzz_cases"] >= 10_000
    assert found["wrong"] == 0, json.dumps(found, indent=2)


class TestTheJudge:
    """It must see what is wrong, or its zeros mean nothing."""

    def case(self, strategy: str = "topk") -> Case:
        given = Given(2, "contiguous", "none", False, 0)
        return Case(Host(), "fp32", strategy, (("k", 0.25),), "gather", "*", (given,))

    def wrong(self) -> str:
        tally = Tally()
        answers.run(self.case(), tally)
        return "\n".join(tally.wrong)

    def test_a_right_answer(self) -> None:
        assert not self.wrong()

    def test_a_kernel_that_is_off(self, monkeypatch: pytest.MonkeyPatch) -> None:
        real = Gather.__call__
        monkeypatch.setattr(Gather, "__call__", lambda *args: real(*args) * 1.01)
        assert "off the reference" in self.wrong()

    def test_images_that_influence_each_other(self, monkeypatch: pytest.MonkeyPatch) -> None:
        real = Gather.__call__

        def mixed(self: Gather, inputs: AttentionInputs, pattern: Pattern) -> torch.Tensor:
            return real(self, inputs, pattern) + 0.1 * (inputs.q.shape[0] > 1)

        monkeypatch.setattr(Gather, "__call__", mixed)
        monkeypatch.setattr("reliability.calls.same_as_reference", lambda *_: None)
        assert "from itself alone" in self.wrong()

    def test_an_error_of_nobody(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Gather, "__call__", lambda *_: {}["key"])
        assert "KeyError is no documented error" in self.wrong()

    def test_the_root_of_errors_is_no_leaf(self) -> None:
        with pytest.raises(Wrong):
            Tally().documented(sparsiattn.SparsiattnError("which?"))


def _masked(logit: float) -> AttentionInputs:
    """Two prefix tokens, half of the keys under Swin's -100."""
    inputs = random_inputs((2, 4), prefix=2)
    q, k, v = inputs.q * logit, inputs.k, inputs.v
    bias = torch.zeros(1, 3, 10, 10)
    bias[..., ::2] = -100.0
    site = Site.of(q, k, v, prefix_tokens=2, grid=(2, 4), key_grid=(2, 4), bias="mask")
    return AttentionInputs(q, k, v, 1.0, bias, site)


def test_prefix_rows_see_no_masked_key_however_large_its_logit() -> None:
    inputs = _masked(100.0)
    scores = torch.randn(2, 3, 10, 10, generator=torch.Generator().manual_seed(0))
    pattern = finish(Pattern.top(scores, 4), inputs)
    torch.testing.assert_close(Gather()(inputs, pattern), Reference()(inputs, pattern))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tile", [1, (2, 2)])
def test_gather_takes_no_image(dtype: torch.dtype, tile: object) -> None:
    model = tiny_vit().to(dtype)
    x = tiny_images().to(dtype)
    with torch.no_grad(), sparsiattn.patch(model, "topk", k=0.25, tile=tile, kernel="gather"):
        assert model(x[:0]).shape == (0, 5)


class Stop(KeyboardInterrupt):
    """Control-C."""


def _interrupt(model: torch.nn.Module, x: torch.Tensor) -> None:
    def stop(*_: object) -> None:
        raise Stop

    hook = model.blocks[1].attn.proj.register_forward_pre_hook(stop)  # type: ignore[index,union-attr]
    with pytest.raises(Stop):
        model(x)
    hook.remove()


def test_an_interrupted_model_does_not_answer_for_another() -> None:
    model, other, x = tiny_vit(), tiny_vit(), tiny_images()
    with torch.no_grad():
        dense = other(x)
        with sparsiattn.patch(model, "topk", k=0.1):
            sparse = model(x)
            _interrupt(model, x)
            assert torch.equal(other(x), dense)
            _interrupt(model, x)
            assert torch.equal(model(x), sparse)


def test_features_have_all_positions_after_an_interrupt() -> None:
    model, x = tiny_vit(), tiny_images()
    with torch.no_grad(), sparsiattn.patch(model, "token_drop", keep=0.5):
        features = model.forward_features(x)  # type: ignore[operator]
        _interrupt(model, x)
        assert torch.equal(model.forward_features(x), features)  # type: ignore[operator]


def test_topk_ranks_logits_beyond_half_precision() -> None:
    inputs = random_inputs((4, 4), dtype=torch.float16)
    big = inputs.replace(q=inputs.q * 4_000, k=inputs.k * 40)
    logits = big.logits()
    assert torch.isfinite(logits).all()
    assert logits.abs().max() > torch.finfo(torch.float16).max
    exact = (big.q.double() @ big.k.double().mT) * big.scale
    assert torch.equal(logits.argmax(-1), exact.argmax(-1))


@pytest.mark.parametrize("hidden", [float("nan"), 0, -1.0, 1e9, "half", True])
def test_sit_checks_its_width(hidden: object) -> None:
    with pytest.raises(InvalidOption, match="hidden must be"):
        sparsiattn.patch(tiny_vit(), "sit", hidden=hidden)


@pytest.mark.parametrize("option", ["basis", "channels", "basis_threshold", "tokens_per_basis"])
def test_connectivity_takes_no_absurd_number(option: str) -> None:
    with pytest.raises(InvalidOption, match=option):
        sparsiattn.patch(tiny_vit(), "connectivity", **{option: 10**30})


@pytest.mark.parametrize("value", [[0.5], float("inf"), float("nan"), 10**30, "x"])
@pytest.mark.parametrize(("name", "option"), [("sinkhorn", "epsilon"), ("expedit", "temperature")])
def test_numbers_of_methods_are_checked(name: str, option: str, value: object) -> None:
    with pytest.raises(InvalidOption, match=option):
        sparsiattn.patch(tiny_vit(), name, **{option: value})


def test_every_step_of_patching_that_is_interrupted_exists() -> None:
    from sparsiattn.patching import install

    assert all(callable(getattr(install, name)) for name in injected.STEPS)
