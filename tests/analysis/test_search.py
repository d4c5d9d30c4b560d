"""Searching budgets per site and per block."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch.nn import functional as F

import sparsiattn
from sparsiattn.analysis.schedule_search import (
    Candidate,
    CostModel,
    Setting,
    Space,
    TrialRunner,
    space_of,
)
from sparsiattn.strategies import Hybrid
from tests.support import zoo


def host() -> Any:
    """Random weights large enough for attention to matter, more in the first blocks."""
    torch.manual_seed(3)
    model = timm.models.VisionTransformer(
        img_size=32, patch_size=4, embed_dim=32, depth=2, num_heads=2, num_classes=7
    )
    for index, block in enumerate(model.blocks):
        torch.nn.init.normal_(block.attn.qkv.weight, std=0.5 / (index + 1))
    torch.nn.init.normal_(model.head.weight)
    return model.eval()


def images(count: int = 12) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(4))


KEYS, TOKENS = (0.1,), (0.5,)
QUICK: dict[str, Any] = {
    "keys": KEYS,
    "tokens": TOKENS,
    "trials": 10,
    "options_grid": {},
    "progress": False,
}


@pytest.mark.parametrize(
    "strategy", ["local", pytest.param("token_drop", marks=pytest.mark.slow), "hybrid"]
)
def test_the_budget_is_met_and_what_is_said_is_so(strategy: str) -> None:
    model, x = host(), images()
    share = {"local": 0.97, "token_drop": 0.8, "hybrid": 0.8}[strategy]
    result = sparsiattn.search(model, [x[:8], x[8:]], {"macs": share}, strategy=strategy, **QUICK)
    assert result.found.macs <= share * result.macs_dense
    assert result.uniform is not None
    assert result.uniform.macs <= share * result.macs_dense
    assert result.found.divergence <= result.uniform.divergence
    with torch.no_grad():
        dense = model(x).log_softmax(-1)
    with sparsiattn.patch(model, strategy, schedule=result.schedule, only_if_faster=False) as live:
        assert live.report().macs == result.found.macs
        with torch.no_grad():
            sparse = model(x).log_softmax(-1)
    wanted = F.kl_div(sparse, dense, log_target=True, reduction="batchmean").item()
    assert result.found.divergence == pytest.approx(wanted, rel=1e-3, abs=1e-6)
    same = (sparse.argmax(-1) == dense.argmax(-1)).float().mean().item()
    assert result.found.agreement == pytest.approx(same)


def test_no_other_schedule_of_few_is_better() -> None:
    """Where all can be tried, the search finds the best of them."""
    model, x = host(), images()
    options: dict[str, Any] = {"strategy": "token_drop", "tokens": (0.5,), "trials": 5}
    result = sparsiattn.search(model, x, {"macs": 0.8}, **options)
    best = torch.inf
    with torch.no_grad():
        dense = model(x).log_softmax(-1)
    for keeps in itertools.product((1.0, 0.5), repeat=2):
        keep = {f"blocks.{i}": share for i, share in enumerate(keeps)}
        with sparsiattn.patch(model, "token_drop", schedule={"keep": keep}) as live:
            macs = live.report().macs
            with torch.no_grad():
                sparse = model(x).log_softmax(-1)
        if macs is not None and macs <= 0.8 * result.macs_dense:
            found = F.kl_div(sparse, dense, log_target=True, reduction="batchmean").item()
            best = min(best, found)
    assert result.found.divergence == pytest.approx(best, rel=1e-3, abs=1e-6)


def test_agreement_is_kept_with_few_macs() -> None:
    model, x = host(), images(24)
    result = sparsiattn.search(model, x, {"agreement": 0.75}, strategy="token_drop", **QUICK)
    assert result.found.agreement >= 0.75
    assert result.found.macs < result.macs_dense
    assert result.uniform is None or result.found.macs <= result.uniform.macs


def test_latency_is_kept_with_little_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that says what MACs say, so that a test can know the answer."""

    def by_macs(self: TrialRunner, space: Space, candidates: Any, rounds: int) -> list[float]:
        return [self.run(space, candidate).macs / space.macs for candidate in candidates]

    monkeypatch.setattr(TrialRunner, "time", by_macs)
    model, x = host(), images()
    result = sparsiattn.search(model, x, {"latency": 0.7}, strategy="token_drop", **QUICK)
    assert result.found.latency is not None
    assert result.found.latency <= 0.7
    assert result.found.latency == pytest.approx(result.found.macs / result.macs_dense)
    assert result.uniform is not None
    assert result.found.divergence <= result.uniform.divergence


@pytest.mark.slow
def test_latency_is_measured() -> None:
    model = timm.models.VisionTransformer(
        img_size=96, patch_size=4, embed_dim=192, depth=3, num_heads=3, num_classes=7
    )  # large enough for half of the tokens to take less time on a busy machine too
    result = sparsiattn.search(
        model.eval(), torch.randn(2, 3, 96, 96), {"latency": 1.0}, strategy="token_drop",
        tokens=(0.3,), trials=1, rounds=3,
    )  # fmt: skip
    assert result.found.latency is not None
    assert 0 < result.found.latency <= 1.0


def test_the_model_is_left_as_it_was() -> None:
    model = host()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    live = sparsiattn.patch(model, k=0.3)
    torch.nn.init.uniform_(live.runtimes[0].planner.up, 0, 1)  # type: ignore[attr-defined]
    with torch.no_grad():
        patched = model(images())
    rng = torch.get_rng_state()
    sparsiattn.search(model, images(), {"agreement": 0.5}, **QUICK)
    assert torch.equal(rng, torch.get_rng_state())
    with torch.no_grad():
        assert torch.equal(model(images()), patched)
    live.unpatch()
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_patched_models_planners_are_searched_with() -> None:
    model, x = host(), images(4)
    with sparsiattn.patch(model, k=0.3) as live:
        runs = []
        for _ in range(2):
            runner = TrialRunner(model, [x], None, only_if_faster=False)
            with runner.patched(None, live.strategy) as probe:
                space = space_of(probe, [Setting(live.strategy)], KEYS, TOKENS)
            runs.append(runner.run(space, Candidate(0, (0.1,) * len(space.genes))))
            with sparsiattn.patch(host(), k=0.1) as other, torch.no_grad():
                other.model.load_state_dict(model.state_dict())
                wanted = other.model(x).argmax(-1)
                dense = host()(x).argmax(-1)
            assert runs[-1].agreement == (wanted == dense).float().mean().item()
            for runtime in live.runtimes:
                torch.nn.init.uniform_(runtime.planner.up, 0, 1)  # type: ignore[attr-defined]
        assert runs[0].divergence != runs[1].divergence


def test_schedules_are_files_that_patch_reads(tmp_path: Path) -> None:
    model = host()
    result = sparsiattn.search(model, images(), {"macs": 0.8}, strategy="hybrid", **QUICK)
    path = result.save(tmp_path / "schedule.json")
    content = json.loads(path.read_text())
    assert set(content) == {"k", "keep", "about"}
    assert content["about"]["found"]["macs"] == result.found.macs
    with sparsiattn.patch(model, "hybrid", schedule=path, only_if_faster=False) as live:
        assert live.report().macs == result.found.macs
    assert "hybrid, macs=0.8: " in str(result)
    json.dumps(result.to_dict())


def test_the_same_seed_finds_the_same() -> None:
    first, again = (
        sparsiattn.search(host(), images(4), {"macs": 0.8}, strategy="token_drop", seed=5, **QUICK)
        for _ in range(2)
    )
    assert first.schedule == again.schedule


def test_sums_of_macs_are_near_the_truth() -> None:
    """The estimate that orders schedules, against the report of the patch itself."""
    model = host()
    base = Hybrid(keep=0.5, layers=(0,))
    runner = TrialRunner(model, [images(2)], None, only_if_faster=False)
    with runner.patched(None, base) as live:
        space = space_of(live, [Setting(Hybrid())], (1.0, 0.1), (1.0, 0.7, 0.5))
    saved = {}
    for i, gene in enumerate(space.genes):
        for share in gene.shares[1:]:
            dense = space.dense.shares
            alone = (*dense[:i], share, *dense[i + 1 :])
            saved[i, share] = float(space.macs - runner.run(space, Candidate(0, alone)).macs)
    estimates = CostModel(space, {}, saved)
    assert estimates.macs(space.dense) == pytest.approx(space.macs, rel=1e-6)
    generator = torch.Generator().manual_seed(1)
    for _ in range(4):
        picks = [int(torch.randint(9, (), generator=generator)) for _ in space.genes]
        shares = tuple(
            gene.shares[p % len(gene.shares)] for gene, p in zip(space.genes, picks, strict=True)
        )
        picked = Candidate(0, shares)
        assert estimates.macs(picked) == pytest.approx(runner.run(space, picked).macs, rel=0.06)


@pytest.mark.parametrize(
    ("budget", "match"),
    [
        ({}, "budget must be one of"), ({"flops": 0.5}, "budget must be one of"),
        ({"macs": 0.5, "latency": 0.5}, "budget must be one of"), ("macs", "budget must be one of"),
        ({"macs": 0.0}, r"in \(0, 1\]"), ({"agreement": 1.5}, r"in \(0, 1\]"),
        ({"latency": "fast"}, r"in \(0, 1\]"), ({"macs": True}, r"in \(0, 1\]"),
        ({"macs": 1}, "no schedule of 'token_drop' met MACs <= 1"),
    ],
)  # fmt: skip
def test_budgets_that_cannot_be(budget: Any, match: str) -> None:
    with pytest.raises(sparsiattn.InvalidOption, match=match):
        sparsiattn.search(
            host(),
            images(4),
            budget,
            strategy="token_drop",
            tokens=(0.5,),
            trials=2,
            progress=False,
        )


@pytest.mark.parametrize(
    ("strategy", "options", "match"),
    [
        ("dense", {}, "varies k per site"),
        ("token_merge", {"tokens": (0.4,)}, "at most half"),
        ("token_drop", {"layers": [1, 7]}, r"layers must be blocks .* got \[7\]"),
        ("token_drop", {"trials": 0}, "trials must be an int >= 1, got 0"),
        ("token_drop", {"rounds": None}, "rounds must be an int >= 1, got None"),
        ("token_drop", {"budget_s": -1}, "budget_s must be seconds > 0"),
        ("token_drop", {"metric": "colour"}, "metric must be"),
        ("connectivity", {"options_grid": {"k": [0.5]}}, "pass shares to choose from as keys="),
        ("token_merge", {"options_grid": {"ratio": [0.9]}}, "as tokens="),
        ("connectivity", {"options_grid": {"tile": (9, 9)}}, "tile must be"),
        ("connectivity", {"options_grid": {"tile": [1, (9, 9)]}}, "grid for tile"),
        ("connectivity", {"options_grid": {"tile": []}}, "a list of values for every option"),
        ("connectivity", {"options_grid": {"colour": [1]}}, "colour"),
        ("connectivity", {"keys": (0.5, 2)}, "keys must be floats"),
        ("connectivity", {"keys": ()}, "keys must be floats"),
        ("connectivity", {"colour": 1}, "colour"),
    ],
)  # fmt: skip
def test_what_cannot_be_searched(strategy: str, options: Any, match: str) -> None:
    with pytest.raises(sparsiattn.SparsiattnError, match=match):
        sparsiattn.search(host(), images(2), {"macs": 0.9}, strategy=strategy, **options)


@pytest.mark.parametrize("given", [torch.randn(3, 32, 32), [], torch.randn(0, 3, 32, 32)])
def test_images_must_be_batches(given: Any) -> None:
    with pytest.raises(sparsiattn.InvalidOption, match="images must be a batch"):
        sparsiattn.search(host(), given, {"macs": 0.9})


def test_another_strategy_than_the_patches_is_refused() -> None:
    with (
        sparsiattn.patch(zoo.build("vit"), k=0.3) as live,
        pytest.raises(sparsiattn.InvalidOption, match="uses its strategy"),
    ):
        sparsiattn.search(live.model, images(2), {"macs": 0.9}, strategy="topk")
