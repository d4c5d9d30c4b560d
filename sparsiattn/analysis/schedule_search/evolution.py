"""The search: uniform candidates, single changes, and proposals derived from them."""

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
"""Candidates up to this factor over the time limit are timed again, as first timings are short."""


class Runner(Protocol):
    """Evaluates candidates, see `TrialRunner`."""

    def run(self, space: Space, candidate: Candidate) -> Trial:
        """Run a candidate without timing it."""

    def time(self, space: Space, candidates: Sequence[Candidate], rounds: int) -> list[float]:
        """Times relative to the dense model, measured together."""


@dataclass
class Search:
    """One running search.

    Attributes:
        runner: Evaluates candidates.
        space: The search space.
        budget: The limit for candidates.
        plan: The number of trials.
        generator: Random generator for neighbours.
        advance: Called with the number of candidates run.
        deadline: Time of `time.monotonic` after which no more candidates are run.
        trials: Results by candidate.
        raced: Candidates that were timed together, and the dense one.
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
        """Whether the budget is a budget of time."""
        return self.budget.kind == "latency"

    @property
    def is_late(self) -> bool:
        """Whether the deadline has passed; False before the first trial."""
        return bool(self.trials) and time.monotonic() > self.deadline

    def solve(self) -> Trial:
        """Run the search, and return the best candidate within the budget.

        It is at least as good as every uniform candidate that was run and meets the budget, by the
        figures in `trials`.

        Raises:
            InvalidOption: No candidate meets the budget.
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
        """The best trial so far; for a budget of time, among the raced ones if there are any."""
        return self.budget.best([*self.final(), *self.dense()])

    def best_uniform(self) -> Trial | None:
        """The best uniform trial."""
        return self.budget.best(t for t in self.final() if t.candidate in self.uniforms)

    def final(self) -> list[Trial]:
        """Trials with final figures."""
        return [t for c, t in self.trials.items() if not self.raced or c in self.raced]

    def dense(self) -> list[Trial]:
        """The trial of the dense model, if a candidate equals it; it need not be run."""
        exact = self.space.is_exact
        return [Trial(self.space.dense, 0.0, 1.0, self.space.macs, 1.0)] if exact else []

    def run(self, candidate: Candidate) -> Trial | None:
        """The trial of a candidate, which may have been run before; None after the deadline."""
        if self.space.keeps_all(candidate):
            return self.dense()[0]
        if candidate not in self.trials:
            if self.is_late:
                return None
            self.trials[candidate] = self.runner.run(self.space, candidate)
            self.advance(len(self.trials))
        return self.trials[candidate]

    def run_and_time(self, candidate: Candidate) -> Trial | None:
        """As `run`; for a budget of time, also time the candidate if it could be the best."""
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
        """Fit the estimates to the times measured so far."""
        if self.timed:
            self.costs.learn_times(self.trials.values())

    def propose(self, until: int) -> None:
        """Run the candidates with the best estimates, using a third of the remaining trials."""
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
        """Uniform candidates with all options, including those that are not run by default."""
        shares = [candidate.shares for candidate in self.uniforms]
        return [Candidate(s, row) for s in range(len(self.space.settings)) for row in shares]

    @property
    def limit(self) -> float:
        """Limit of estimated costs, relative to the dense model."""
        if self.budget.kind == "macs":
            return self.budget.limit / self.space.macs
        return self.budget.limit

    def bisect(self, candidates: list[Candidate], until: int) -> None:
        """Find the smallest MACs with enough agreement, among candidates with ascending MACs."""
        low, high = 0, len(candidates) - 1
        while low <= high and len(self.trials) < until:
            middle = (low + high) // 2
            trial = self.run(candidates[middle])
            if trial is None:
                return
            # agreement almost always falls with MACs
            low, high = (low, middle - 1) if self.budget.met_by(trial) else (middle + 1, high)

    def evolve(self, until: int) -> None:
        """Run neighbours of the best trial so far, until no trials are left.

        If 50 draws give nothing new, neighbours of the next best trial and more expensive ones are
        tried: cost estimates may be too high, so that nothing seems to fit.
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
        """Whether a candidate differs from all that were run and from the dense model."""
        known = candidate in self.trials or self.space.keeps_all(candidate)
        return not known and not self.costs.is_idle(candidate)

    def parent(self, rank: int) -> Trial:
        """The trial of this rank, or the nearest one if no trial meets the budget."""
        if rank == 0:
            return self.best() or self.nearest()
        fitting = filter(self.budget.met_by, self.trials.values())
        ranked = sorted(fitting, key=self.budget.order) or [self.nearest()]
        return ranked[rank % len(ranked)]

    def nearest(self) -> Trial:
        """The trial that is nearest to the budget, if none meets it."""

        def distance(trial: Trial) -> float:
            if self.budget.kind == "agreement":
                return -trial.agreement
            return trial.macs / self.space.macs if trial.latency is None else trial.latency

        return min(self.trials.values(), key=distance)

    def race(self) -> None:
        """Time the best candidates together, until no other candidate may be better.

        Otherwise random variation of a short timing would decide. The leading candidates are timed
        once more, together with the next ones or alone: a candidate that was selected for its time
        tends to be a lucky measurement, and the result and the best uniform candidate should have
        times from the same rounds.
        """
        near = replace(self.budget, limit=MARGIN * self.budget.limit)
        fitting = sorted(filter(near.met_by, self.trials.values()), key=self.budget.order)
        waiting = [trial.candidate for trial in fitting]
        self.raced = {self.space.dense}
        led: list[Candidate] = []
        while True:
            best, uniform = self.best(), self.best_uniform()
            uniforms = [c for c in waiting if c in self.uniforms]
            wanted = (
                self.better(waiting, best)[: FINALISTS - 2] + self.better(uniforms, uniform)[:2]
            )
            leading = [trial.candidate for trial in (best, uniform) if trial is not None]
            if not wanted and leading == led:
                return
            self.time_together([*leading, *wanted])
            waiting = [c for c in waiting if c not in self.raced]
            led = leading

    def better(self, candidates: Iterable[Candidate], than: Trial | None) -> list[Candidate]:
        """The candidates whose trials are better than a given one."""
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
        """Raise an error that no candidate meets the budget, with the nearest one."""
        trials, name = self.trials.values(), self.space.settings[0].strategy.name
        if self.timed:
            nearest = f"fastest took {min(t.latency for t in trials if t.latency is not None)}"
        elif self.budget.kind == "agreement":
            nearest = f"nearest has {max(t.agreement for t in trials):.4g}"
        else:
            macs = min(trial.macs for trial in trials)
            nearest = f"cheapest has {macs:,} of {self.space.macs:,} MACs"
        late = " before the time limit budget_s" if self.is_late else ""
        other = "" if name == "hybrid" else ", or search 'hybrid'"
        raise InvalidOption(
            f"no schedule of {name!r} met {self.budget}: of {len(trials)} tried{late}, the "
            f"{nearest}; relax the budget, pass other shares (keys=, tokens=), raise trials="
            f"{other}"
        )
