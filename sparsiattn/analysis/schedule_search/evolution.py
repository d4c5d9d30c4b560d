"""The search itself: uniform candidates, single changes, and proposals made from them."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from sparsiattn.analysis.schedule_search.budget import Budget
from sparsiattn.analysis.schedule_search.evaluation import Trial
from sparsiattn.analysis.schedule_search.pareto import CostModel, mutated
from sparsiattn.analysis.schedule_search.plan import FINALISTS, Plan
from sparsiattn.analysis.schedule_search.space import Candidate, Space
from sparsiattn.errors import InvalidOption

MARGIN = 1.05
"""Times up to this over the limit are measured again: the first timings are short."""


class Runner(Protocol):
    """What measures candidates."""

    def run(self, space: Space, candidate: Candidate) -> Trial:
        """A trial of the candidate, not timed."""

    def time(self, space: Space, candidates: Sequence[Candidate], rounds: int) -> list[float]:
        """Their times over the dense model's, measured together."""


@dataclass
class Search:
    """One search under way.

    Attributes:
        runner: Measures candidates.
        space: What there is to choose.
        budget: What they must keep to.
        plan: How many to run.
        generator: Draws neighbours.
        advance: Called with the number of candidates run.
        deadline: Seconds of `time.monotonic` after which no other candidate is run.
        trials: What was run.
        raced: Those whose times were measured together, and the dense one.
        costs: Estimates from single changes.
    """

    runner: Runner
    space: Space
    budget: Budget
    plan: Plan
    generator: random.Random
    advance: Callable[[int], Any] = lambda done: None
    deadline: float = float("inf")
    trials: dict[Candidate, Trial] = field(default_factory=dict)
    raced: set[Candidate] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.costs = CostModel(self.space)
        self.uniforms = set(self.space.uniforms())

    @property
    def timed(self) -> bool:
        """Whether the budget is one of time."""
        return self.budget.kind == "latency"

    @property
    def is_late(self) -> bool:
        """Whether time is up; never before the first trial."""
        return bool(self.trials) and time.monotonic() > self.deadline

    def solve(self) -> Trial:
        """The best candidate within the budget.

        No uniform one that was run and keeps to the budget is better, by the figures in `trials`.

        Raises:
            InvalidOption: None keeps to it.
        """
        for candidate in self.plan.uniforms:
            trial = None if self.costs.is_idle(candidate) else self.run_and_time(candidate)
            if trial is not None:
                self.costs.note_idle(trial)
        for candidate in self.plan.singles:
            if not self.costs.is_idle(candidate):
                self.run(candidate)
        self.costs.learn(self.trials)
        self.learn_times()
        until = len(self.trials) + self.plan.proposals
        self.propose(until)
        self.evolve(until)
        if self.timed:
            self.race()
        return self.best() or self.fail()

    def best(self) -> Trial | None:
        """The best so far; where times are the budget, of those raced, once any were."""
        return self.budget.best([*self.final(), *self.dense()])

    def best_uniform(self) -> Trial | None:
        """The best uniform one."""
        return self.budget.best(t for t in self.final() if t.candidate in self.uniforms)

    def final(self) -> list[Trial]:
        """Trials whose figures count."""
        return [t for c, t in self.trials.items() if not self.raced or c in self.raced]

    def dense(self) -> list[Trial]:
        """The dense model, where a candidate is that; it need not be run."""
        exact = self.space.is_exact
        return [Trial(self.space.dense, 0.0, 1.0, self.space.macs, 1.0)] if exact else []

    def run(self, candidate: Candidate) -> Trial | None:
        """The trial of a candidate, from before where there is one; None where time is up."""
        if self.space.keeps_all(candidate):
            return self.dense()[0]
        if candidate not in self.trials:
            if self.is_late:
                return None
            self.trials[candidate] = self.runner.run(self.space, candidate)
            self.advance(len(self.trials))
        return self.trials[candidate]

    def run_and_time(self, candidate: Candidate) -> Trial | None:
        """As `run`; where the budget is time, timed as well if it would be the best."""
        trial = self.run(candidate)
        if trial is None or not self.timed or trial.latency is not None:
            return trial
        best = self.best()
        useful = best is None or self.budget.order(trial) < self.budget.order(best)
        if useful or candidate in self.uniforms:
            latency = self.runner.time(self.space, [candidate], self.plan.quick_rounds)[0]
            trial = self.trials[candidate] = replace(trial, latency=latency)
        return trial

    def learn_times(self) -> None:
        """Let estimates go by what was timed so far."""
        if self.timed:
            self.costs.learn_times(self.trials.values())

    def propose(self, until: int) -> None:
        """Run what estimates say is best, in a third of the trials that are left."""
        until = len(self.trials) + max(min(4, until - len(self.trials)), self.plan.proposals // 3)
        candidates = [*self.costs.front(), *self.every_uniform()]
        candidates = [self.space.canonical(c) for c in candidates if not self.costs.is_idle(c)]
        candidates = [c for c in dict.fromkeys(candidates) if c not in self.trials]
        if self.budget.kind == "agreement":
            return self.bisect(sorted(candidates, key=self.costs.macs), until)
        limit = self.limit * (MARGIN if self.timed else 1.02)
        fitting = [c for c in candidates if self.costs.cost(c) <= limit]
        for candidate in sorted(fitting, key=self.costs.divergence):
            if len(self.trials) < until:
                self.run_and_time(candidate)
        self.learn_times()
        return None

    def every_uniform(self) -> list[Candidate]:
        """Uniform candidates with any options, also those that are not run by themselves."""
        shares = [candidate.shares for candidate in self.uniforms]
        return [Candidate(s, row) for s in range(len(self.space.settings)) for row in shares]

    @property
    def limit(self) -> float:
        """Of estimated costs: the budget, over the dense model's."""
        if self.budget.kind == "macs":
            return self.budget.limit / self.space.macs
        return self.budget.limit

    def bisect(self, candidates: list[Candidate], until: int) -> None:
        """Of candidates by ascending MACs, find where agreement begins to suffice."""
        low, high = 0, len(candidates) - 1
        while low <= high and len(self.trials) < until:
            middle = (low + high) // 2
            trial = self.run(candidates[middle])
            if trial is None:
                return
            # agreement falls with MACs, nearly
            low, high = (low, middle - 1) if self.budget.met_by(trial) else (middle + 1, high)

    def evolve(self, until: int) -> None:
        """Run neighbours of the best so far, as long as trials are left.

        Where 50 draws bring nothing new, those of the next best, and dearer ones: estimates may be
        too high, and then nothing seems to fit.
        """
        stuck = 0
        for draw in range(1, 50 * (self.plan.proposals + 10)):
            if len(self.trials) >= until or self.is_late:
                return
            if draw % 50 == 0:
                self.learn_times()
                stuck += 1
            parent, limit = self.parent(stuck), self.limit
            if self.budget.kind == "agreement":
                limit = self.costs.cost(parent.candidate) if self.budget.met_by(parent) else 1.0
            limit *= 1.05**stuck
            child = mutated(self.costs, parent.candidate, limit, self.generator)
            if child is not None and self.is_new(child):
                self.run_and_time(child)
                stuck = 0

    def is_new(self, candidate: Candidate) -> bool:
        """Whether a candidate is like no other that was run, and not the dense model."""
        known = candidate in self.trials or self.space.keeps_all(candidate)
        return not known and not self.costs.is_idle(candidate)

    def parent(self, rank: int) -> Trial:
        """One of the best so far, or the nearest where nothing keeps to the budget."""
        if rank == 0:
            return self.best() or self.nearest()
        fitting = filter(self.budget.met_by, self.trials.values())
        ranked = sorted(fitting, key=self.budget.order) or [self.nearest()]
        return ranked[rank % len(ranked)]

    def nearest(self) -> Trial:
        """What to start from where nothing keeps to the budget."""

        def distance(trial: Trial) -> float:
            if self.budget.kind == "agreement":
                return -trial.agreement
            return trial.macs / self.space.macs if trial.latency is None else trial.latency

        return min(self.trials.values(), key=distance)

    def race(self) -> None:
        """Time the best together, until none is left that may be better than the best of them.

        Otherwise the luck of a short timing would decide. Those that lead are timed once more, with
        the next or alone: what is picked for its time was lucky, and found and uniform should have
        their times from the same rounds.
        """
        near = replace(self.budget, limit=MARGIN * self.budget.limit)
        fitting = sorted(filter(near.met_by, self.trials.values()), key=self.budget.order)
        waiting = [trial.candidate for trial in fitting]
        self.raced = {self.space.dense}
        led: list[Candidate] = []
        while True:
            best, uniform = self.best(), self.best_uniform()
            rest = [c for c in waiting if c in self.uniforms]
            wanted = self.better(waiting, best)[: FINALISTS - 2] + self.better(rest, uniform)[:2]
            leading = [trial.candidate for trial in (best, uniform) if trial is not None]
            if not wanted and leading == led:
                return
            self.time_together([*leading, *wanted])
            waiting = [c for c in waiting if c not in self.raced]
            led = leading

    def better(self, candidates: Iterable[Candidate], than: Trial | None) -> list[Candidate]:
        """Those whose trials are better than one."""
        order, trials = self.budget.order, self.trials
        return [c for c in candidates if than is None or order(trials[c]) < order(than)]

    def time_together(self, candidates: Iterable[Candidate]) -> None:
        """Time candidates in the same rounds."""
        group = [c for c in dict.fromkeys(candidates) if not self.space.keeps_all(c)]
        times = self.runner.time(self.space, group, self.plan.rounds) if group else []
        for candidate, latency in zip(group, times, strict=True):
            self.trials[candidate] = replace(self.trials[candidate], latency=latency)
        self.raced |= set(group)

    def fail(self) -> Trial:
        """Say that nothing keeps to the budget, and what came nearest."""
        trials, name = self.trials.values(), self.space.settings[0].strategy.name
        if self.timed:
            nearest = f"fastest took {min(t.latency for t in trials if t.latency is not None)}"
        elif self.budget.kind == "agreement":
            nearest = f"nearest has {max(t.agreement for t in trials):.4g}"
        else:
            macs = min(trial.macs for trial in trials)
            nearest = f"cheapest has {macs:,} of {self.space.macs:,} MACs"
        late = " before budget_s was over" if self.is_late else ""
        other = "" if name == "hybrid" else ", or search 'hybrid'"
        raise InvalidOption(
            f"no schedule of {name!r} met {self.budget}: of {len(trials)} tried{late}, the "
            f"{nearest}; allow more, offer other shares (keys=, tokens=), try more (trials=)"
            f"{other}"
        )
