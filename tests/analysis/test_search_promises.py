"""What a search promises, over made-up models: tables of costs and qualities without any order."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sparsiattn
from sparsiattn.analysis.schedule_search import (
    Budget,
    Candidate,
    Plan,
    Search,
    Setting,
    Space,
    Trial,
    evolution,
)
from sparsiattn.analysis.schedule_search.space import Gene
from sparsiattn.strategies import Local

MACS = 1000
KEYS, TOKENS = (1.0, 0.5, 0.1), (1.0, 0.7, 0.5)


@dataclass
class FakeRunner:
    """Any candidate has figures of its own; times differ from one measurement to the next."""

    seed: int
    ordered: bool
    noise: float
    runs: list[Candidate] = field(default_factory=list)
    races: list[tuple[list[Candidate], list[float]]] = field(default_factory=list)

    def figures(self, candidate: Candidate) -> tuple[float, float, int, float]:
        draw = random.Random(f"{self.seed} {candidate}")
        gone = sum(1 - share for share in candidate.shares) / len(candidate.shares)
        if not self.ordered:
            gone = draw.random()
        latency = 1.1 - 0.7 * gone + 0.1 * draw.random()
        divergence = gone * (0.5 + draw.random()) * (1 + candidate.setting)
        return divergence, round(1 - gone * draw.random(), 2), round(MACS * (1 - gone)), latency

    def run(self, space: Space, candidate: Candidate) -> Trial:
        assert candidate not in self.runs, "no candidate is run twice"
        self.runs.append(candidate)
        divergence, agreement, macs, _ = self.figures(candidate)
        return Trial(candidate, divergence, agreement, macs)

    def time(self, space: Space, candidates: Sequence[Candidate], rounds: int) -> list[float]:
        draw = random.Random(f"{self.seed} {len(self.races)}")
        times = [self.figures(c)[3] * (1 + self.noise * draw.uniform(-1, 1)) for c in candidates]
        self.races.append((list(candidates), times))
        return times


def space_with(sites: int, blocks: int, options: int, exact: bool = True) -> Space:
    genes = [Gene(f"s{i}", "k", float(i), KEYS) for i in range(sites)]
    genes += [Gene(f"b{i}", "keep", i + 0.5, TOKENS) for i in range(blocks)]
    genes.sort(key=lambda gene: gene.depth)
    places = frozenset(i for i, gene in enumerate(genes) if gene.kind == "keep")
    choices = tuple(Setting(Local(), {"tile": i}) for i in range(options))
    return Space(tuple(genes), MACS, choices, places, is_exact=exact)


spaces = st.builds(
    space_with, st.integers(1, 4), st.integers(0, 4), st.integers(1, 3), st.booleans()
)
runners = st.builds(
    FakeRunner, st.integers(0, 10**6), st.booleans(), st.sampled_from([0.0, 0.05, 0.4])
)
limits = st.sampled_from([0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 1.0])


def searched(
    runner: FakeRunner, space: Space, kind: str, limit: float, trials: int | None, seed: int
) -> tuple[Search, Trial | None]:
    budget = Budget(kind, limit * MACS if kind == "macs" else limit)
    plan = Plan.of(space, trials, 9 if kind == "latency" else 0)
    job = Search(runner, space, budget, plan, random.Random(seed))
    try:
        return job, job.solve()
    except sparsiattn.InvalidOption:
        return job, None


def goal(kind: str, trial: Trial) -> tuple[float, float]:
    """What the least is best of, written anew."""
    if kind == "agreement":
        return (trial.macs, trial.divergence)
    return (trial.divergence, trial.macs)


def fits(kind: str, limit: float, trial: Trial) -> bool:
    if kind == "agreement":
        return trial.agreement >= limit
    if kind == "macs":
        return trial.macs <= limit * MACS
    return trial.latency is not None and trial.latency <= limit


@pytest.mark.parametrize("kind", ["macs", "latency", "agreement"])
@settings(max_examples=20, deadline=None)
@given(runner=runners, space=spaces, limit=limits, seed=st.integers(0, 99), data=st.data())
def test_never_worse_than_a_uniform_schedule(
    kind: str, runner: FakeRunner, space: Space, limit: float, seed: int, data: Any
) -> None:
    trials = data.draw(st.sampled_from([None, 1, 3, 10, 40]))
    job, found = searched(runner, space, kind, limit, trials, seed)
    uniform = [t for c, t in job.trials.items() if c in space.uniforms()]
    assert uniform
    assert len(runner.runs) == len(job.trials) <= job.plan.trials
    if trials is not None:
        assert job.plan.trials == trials
    rivals = [trial for trial in uniform if fits(kind, limit, trial)]
    if found is None:
        assert not rivals
        return
    assert fits(kind, limit, found)
    assert all(goal(kind, found) <= goal(kind, rival) for rival in rivals)
    best = job.best_uniform()
    if best is None:
        assert not rivals
    else:
        assert goal(kind, best) == min(goal(kind, rival) for rival in rivals)
        assert fits(kind, limit, best)


@settings(max_examples=15, deadline=None)
@given(runner=runners, space=spaces, limit=limits, seed=st.integers(0, 99))
def test_found_and_uniform_have_their_times_from_the_same_rounds(
    runner: FakeRunner, space: Space, limit: float, seed: int
) -> None:
    job, found = searched(runner, space, "latency", limit, None, seed)
    uniform = job.best_uniform()
    if found is None or uniform is None or space.keeps_all(found.candidate):
        return
    last = dict(zip(*runner.races[-1], strict=True))
    assert found.latency == last[found.candidate]
    assert uniform.latency == last[uniform.candidate]
    raced = [group for group, _ in runner.races if len(group) > 1 and found.candidate in group]
    assert len(raced) > 1 or found == uniform, "what was picked for its time is timed once more"


@pytest.mark.parametrize("trials", [1, 2, 5, 9, 14, 15, 16, 30])
def test_no_more_trials_than_asked_for(trials: int) -> None:
    space, runner = space_with(3, 2, 2), FakeRunner(1, True, 0.0)
    searched(runner, space, "macs", 0.6, trials, 0)
    assert len(runner.runs) == trials


def test_without_a_number_all_uniform_ones_and_single_changes_run_and_60_more() -> None:
    space, runner = space_with(3, 2, 2), FakeRunner(1, True, 0.0)
    job, _ = searched(runner, space, "macs", 0.6, None, 0)
    # 3 x 3 shares but the dense ones, with other options those of keys; 5 genes of 2 shares
    assert (len(job.plan.uniforms), len(job.plan.singles), job.plan.proposals) == (10, 10, 60)
    assert len(runner.runs) == 80


def test_time_that_is_over_ends_it_with_the_best_so_far(monkeypatch: pytest.MonkeyPatch) -> None:
    runner, space = FakeRunner(1, True, 0.0), space_with(3, 2, 1)
    monkeypatch.setattr(evolution.time, "monotonic", lambda: float(len(runner.runs)))
    plan = Plan.of(space, None)
    job = Search(runner, space, Budget("macs", 800), plan, random.Random(0), deadline=11.0)
    found = job.solve()
    assert len(runner.runs) == 12
    assert found.macs <= 800
    least = min(t.divergence for t in job.trials.values() if t.macs <= 800)
    assert found.divergence == least


def test_structure_is_found() -> None:
    """One site minds, the others do not: the search leaves that one alone."""

    @dataclass
    class Sums(FakeRunner):
        def figures(self, candidate: Candidate) -> tuple[float, float, int, float]:
            harms = [10.0, 0.01, 0.01, 0.01]
            gone = [1 - share for share in candidate.shares]
            harm = sum(h * g for h, g in zip(harms, gone, strict=True))
            share = sum(gone) / len(gone)
            return harm, 1.0, round(MACS * (1 - 0.8 * share)), 1.1 - 0.8 * share

    for kind in ("macs", "latency"):
        job, found = searched(Sums(0, True, 0.0), space_with(4, 0, 1), kind, 0.6, 40, 0)
        uniform = job.best_uniform()
        assert found is not None
        assert found.candidate.shares[0] == 1.0
        assert uniform is not None
        assert found.divergence < 0.1 * uniform.divergence


def test_keys_that_change_nothing_are_not_tried_again() -> None:
    """As where sparse attention should lose and sites stay dense."""

    @dataclass
    class TokensAlone(FakeRunner):
        def figures(self, candidate: Candidate) -> tuple[float, float, int, float]:
            gone = sum(1 - share for share in candidate.shares[1::2])
            return gone, 1.0, round(MACS * (1 - 0.3 * gone)), 1 - 0.3 * gone

    runner, space = TokensAlone(0, True, 0.0), space_with(2, 2, 2)
    searched(runner, space, "latency", 0.9, None, 0)
    with_fewer_keys = [c for c in runner.runs if min(c.shares[::2]) < 1]
    assert len(with_fewer_keys) == 4  # two shares with each of two options
    assert len(runner.runs) == 4 + 8  # and every way to drop tokens
