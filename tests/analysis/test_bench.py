"""`bench`, `measure_sites` and the timing they share; no assertion reads a real clock."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import sparsiattn
from sparsiattn import InvalidOption, bench, measure_sites
from sparsiattn.kernels import Gather, MaskedSDPA, cost
from sparsiattn.runtime import timing
from tests.support import zoo


@pytest.fixture
def took(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[float]]:
    """Every call named here takes these seconds; each still runs once."""
    given = {"dense": [2.0, 4.0, 6.0], "sparse": [1.0, 1.0, 2.0]}

    def alternate(
        calls: Mapping[str, Callable[[], Any]], rounds: int, progress: object = None
    ) -> dict[str, list[float]]:
        for call in calls.values():
            call()
        return {name: given[name][:rounds] for name in calls}

    monkeypatch.setattr(timing, "alternate", alternate)
    return given


def test_rounds_turn_the_order(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    monkeypatch.setattr(timing, "seconds", lambda call: call() or 1.0)
    calls = {"a": lambda: ran.append("a"), "b": lambda: ran.append("b")}
    found = timing.alternate(calls, 4)
    assert "".join(ran) == "ab" + "ab" + "ba" + "ab" + "ba"
    assert found == {"a": [1.0] * 4, "b": [1.0] * 4}


def test_ratios_are_of_pairs_not_of_medians() -> None:
    found = timing.Timing.of([1.0, 10.0, 2.0], [2.0, 30.0, 2.0]).to_dict()
    assert found["ratio"] == 2.0
    assert (found["first_ms"], found["second_ms"]) == (2000.0, 2000.0)
    assert found["ratio_quartiles"] == [1.5, 2.5]
    assert timing.Timing.of([1.0], [3.0]).ratio == (3.0, 3.0, 3.0)


def test_the_card_names_no_path() -> None:
    card = timing.machine()
    assert {"date", "torch", "timm", "sparsiattn", "processor", "threads"} <= set(card)
    assert "/" not in "".join(str(value) for name, value in card.items() if name != "processor")


def test_a_patched_model_is_measured_as_it_is(took: dict[str, list[float]]) -> None:
    model = zoo.build("vit")
    x = zoo.images(model)
    with torch.no_grad(), sparsiattn.patch(model, "local", k=0.25) as live:
        sparse = model(x)
        found = bench(model, x, rounds=3)
        assert sparsiattn.patch_of(model) is live
        assert torch.equal(model(x), sparse)
    assert found.ratio == 3.0
    assert (found.dense_ms, found.sparse_ms) == (4000.0, 1000.0)
    assert found.strategy == "local"
    assert found.input_shape == tuple(x.shape)
    assert "3.00x" in str(found)
    document = json.loads(json.dumps(found.to_dict()))
    assert document["report"]["sites"][0]["measured"] == 4.0
    assert document["machine"]["torch"] == torch.__version__


def test_an_unpatched_model_is_patched_for_the_time_being(took: dict[str, list[float]]) -> None:
    model = zoo.build("vit")
    x = zoo.images(model)
    keys = list(model.state_dict())
    found = bench(model, x, strategy="topk", k=0.5, rounds=2, sites=False)
    assert found.strategy == "topk"
    assert [row.k for row in found.report.sites] == [0.5, 0.5]
    assert all(row.measured is None for row in found.report.sites)
    assert sparsiattn.patch_of(model) is None
    assert list(model.state_dict()) == keys


def test_the_dense_side_is_the_host_without_hooks_on_the_same_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    outputs: dict[str, torch.Tensor] = {}
    model = zoo.build("vit")
    x = zoo.images(model)
    with torch.no_grad():
        dense = model(x)

    def alternate(
        calls: Mapping[str, Callable[[], Any]], rounds: int, progress: object = None
    ) -> dict[str, list[float]]:
        outputs.update({name: call() for name, call in calls.items()})
        hosts = [c.cell_contents for c in calls["dense"].__closure__]  # type: ignore[attr-defined]
        twin = next(host for host in hosts if isinstance(host, nn.Module))
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in twin.modules())
        ours = {p.data_ptr() for p in model.parameters()}
        assert {p.data_ptr() for p in twin.parameters()} <= ours
        return {name: [1.0, 1.0] for name in calls}

    monkeypatch.setattr(timing, "alternate", alternate)
    with sparsiattn.patch(model, k=0.1):
        bench(model, x, rounds=2, sites=False)
    assert torch.equal(outputs["dense"], dense)
    assert not torch.equal(outputs["sparse"], dense)


def test_a_compiled_model_is_measured_compiled(took: dict[str, list[float]]) -> None:
    model = zoo.build("vit")
    compiled = torch.compile(model, backend="eager")
    found = bench(compiled, zoo.images(model), k=0.1, rounds=2, sites=False)
    assert found.model == "VisionTransformer"
    torch.compiler.reset()


def test_training_mode_and_patch_come_back_after_a_fault() -> None:
    model = zoo.build("vit").train()
    with pytest.raises(AssertionError):
        bench(model, torch.randn(1, 3, 64, 64), rounds=1)
    assert model.training
    assert sparsiattn.patch_of(model) is None


@pytest.mark.parametrize("rounds", [0, 1.5, True])
def test_rounds_are_checked(rounds: Any) -> None:
    with pytest.raises(InvalidOption, match="rounds must be"):
        bench(zoo.build("vit"), torch.randn(1, 3, 32, 32), rounds=rounds)


def test_options_beside_a_live_patch_are_refused() -> None:
    model = zoo.build("vit")
    with sparsiattn.patch(model, k=0.1), pytest.raises(InvalidOption, match="unpatch"):
        bench(model, torch.randn(1, 3, 32, 32), k=0.2)


# -- sites --------------------------------------------------------------------------------------


def test_sites_are_measured_and_reported(took: dict[str, list[float]]) -> None:
    model = zoo.build("vit")
    live = sparsiattn.patch(model, "topk", k=[0.25, 1.0])
    before = live.report()
    assert [row.measured for row in before.sites] == [None, None]
    assert str(before).splitlines()[4].rstrip().endswith("-")
    assert measure_sites(live, zoo.images(model)) == {"blocks.0.attn": 4.0}
    first, second = live.report().sites
    assert (first.measured, first.speed, second.measured) == (4.0, 4.0, None)
    assert "4.00x" in str(live.report())


def test_measuring_changes_nothing(took: dict[str, list[float]]) -> None:
    model = zoo.build("vit_registers").train()
    live = sparsiattn.patch(model, k=0.25)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random = torch.get_rng_state()
    measure_sites(live, (zoo.images(model),))
    assert model.training
    assert torch.equal(torch.get_rng_state(), random)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    assert all(parameter.grad is None for parameter in model.parameters())


def test_what_is_timed_is_dense_attention_and_planning_with_kernel(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = zoo.build("vit")
    live = sparsiattn.patch(model, "local", k=0.25, sites="blocks.0.*")
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def alternate(
        calls: Mapping[str, Callable[[], Any]], rounds: int, progress: object = None
    ) -> dict[str, list[float]]:
        seen.append((calls["dense"](), calls["sparse"]()))
        return {"dense": [1.0], "sparse": [0.5]}

    monkeypatch.setattr(timing, "alternate", alternate)
    given: list[tuple[Any, ...]] = []
    with torch.no_grad():
        with live.observing(lambda site, planner, inputs: given.append((planner, inputs))):
            model(zoo.images(model))
        assert measure_sites(live, zoo.images(model)) == {"blocks.0.attn": 2.0}
        planner, inputs = given[0]
        q, k, v = inputs.q, inputs.k, inputs.v
        dense = F.scaled_dot_product_attention(q, k, v, scale=inputs.scale)
        torch.testing.assert_close(seen[0][0], dense)
        runtime, pattern = live.runtimes[0], live.runtimes[0].plan(planner, inputs)
        sparse = runtime.compute(runtime.choose(inputs, pattern), inputs, pattern)
        torch.testing.assert_close(seen[0][1], sparse)


def test_calls_of_one_site_add_up(took: dict[str, list[float]]) -> None:
    if "vit_differential" not in zoo.FAMILIES:
        pytest.skip("this timm has no differential attention")
    model = zoo.build("vit_differential")
    live = sparsiattn.patch(model, "topk", k=0.25)
    assert live.sites[0].calls == 2
    assert set(measure_sites(live, zoo.images(model)).values()) == {4.0}


def test_sites_left_dense_are_not_measured(took: dict[str, list[float]]) -> None:
    model = zoo.build("vit")
    live = sparsiattn.patch(model, "topk", k=0.5, only_if_faster=True)
    assert measure_sites(live, zoo.images(model)) == {}


def test_an_undone_patch_is_refused() -> None:
    model = zoo.build("vit")
    live = sparsiattn.patch(model, k=0.25)
    live.unpatch()
    with pytest.raises(sparsiattn.ModelChanged, match="measure_sites"):
        measure_sites(live, zoo.images(model))


def test_a_measured_speed_holds_for_calls_like_the_one_timed(
    took: dict[str, list[float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = zoo.build("vit").eval()
    live = sparsiattn.patch(model, "local", k=0.25)
    x = zoo.images(model)

    def shown() -> set[float | None]:
        return {row.measured for row in live.report().sites}

    measure_sites(live, x)
    assert shown() == {4.0}
    with torch.no_grad():
        for images, known in ((x[:1], None), (x, 4.0)):  # fewer images, and as before
            model(images)
            assert shown() == {known}
        with monkeypatch.context() as patched:
            patched.setattr(torch, "get_num_threads", lambda: 77)
            assert shown() == {None}
        assert shown() == {4.0}
        kernel = live.report().sites[0].kernel
        other = Gather if kernel != "gather" else MaskedSDPA
        monkeypatch.setattr(other, "speed", lambda *_: 50.0)
        cost.reload()
        model(x)
        assert live.report().sites[0].kernel != kernel
        assert shown() == {None}
    cost.reload()


def test_a_measured_speed_is_of_the_rule_that_was_timed(took: dict[str, list[float]]) -> None:
    model = zoo.build("vit").eval()
    live = sparsiattn.patch(model, "connectivity", k=0.25, kernel="reference")
    measure_sites(live, zoo.images(model))
    with torch.no_grad():  # as `calibrate` does at the first of both sites
        model.get_parameter("blocks.0.attn.sparsiattn.down").mul_(1.5)
    assert [row.measured for row in live.report().sites] == [None, 4.0]
