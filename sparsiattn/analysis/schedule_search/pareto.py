"""Estimates of candidates from single changes, and the Pareto front of these estimates."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from statistics import fmean

import numpy as np

from sparsiattn.analysis.schedule_search.evaluation import Trial
from sparsiattn.analysis.schedule_search.space import Candidate, Gene, Space

Table = dict[tuple[int, float], float]
"""Values by index of the gene and share."""


@dataclass
class CostModel:
    """Estimates the cost and divergence of any candidate as sums of measured single changes.

    Attributes:
        space: The search space.
        harm: Divergence of each gene's share alone.
        saved: MACs that it saves alone.
        key_factors: By setting and share of keys, the divergence and savings of keys relative to
            those with the first options.
        time_rates: Saved share of the dense model's time per saved share of its MACs, by setting
            and whether keys (True) or tokens save them; None to use MACs.
        time_overhead: Share of the dense model's time that any patch adds.
        idle: Settings and shares of keys that change nothing, for example as sites stay dense.
    """

    space: Space
    harm: Table = field(default_factory=dict)
    saved: Table = field(default_factory=dict)
    key_factors: dict[tuple[int, float], tuple[float, float]] = field(default_factory=dict)
    time_rates: dict[tuple[int, bool], float] | None = None
    time_overhead: float = 0.0
    idle: set[tuple[int, float]] = field(default_factory=set)

    def note_idle(self, trial: Trial) -> None:
        """Store the setting and share of keys of a trial that did not change the model."""
        shares = set(trial.candidate.shares) - {1.0}
        unchanged = trial.divergence == 0 and trial.macs == self.space.macs
        if unchanged and len(shares) == 1 and _keeps_tokens(self.space, trial.candidate):
            self.idle.add((trial.candidate.setting, shares.pop()))

    def is_idle(self, candidate: Candidate) -> bool:
        """Whether some share of keys of a candidate has no effect."""
        pairs = zip(self.space.genes, candidate.shares, strict=True)
        return any(g.kind == "k" and (candidate.setting, s) in self.idle for g, s in pairs)

    def learn(self, trials: Mapping[Candidate, Trial]) -> None:
        """Fill the tables from trials of single changes and of uniform shares of keys.

        Single changes that were not run are estimated from the others.
        """
        dense = self.space.dense.shares
        for i, gene in enumerate(self.space.genes):
            for share in gene.shares[1:]:
                trial = trials.get(Candidate(0, (*dense[:i], share, *dense[i + 1 :])))
                if trial is not None:
                    self.harm[i, share] = max(0.0, trial.divergence)
                    self.saved[i, share] = float(self.space.macs - trial.macs)
        reach, macs = _reach(self.space.genes), self.space.macs
        harms = {c: trial.divergence for c, trial in trials.items()}
        savings = {c: float(macs - trial.macs) for c, trial in trials.items()}
        even = [1.0] * len(dense)
        self._complete(self.harm, even, harms)
        self._complete(self.saved, reach, savings)
        self._learn_factors(trials)

    def _complete(
        self, table: Table, reach: list[float], values: Mapping[Candidate, float]
    ) -> None:
        """Estimate the entries that a table lacks.

        Args:
            table: Divergence or savings. A missing share of a gene is scaled from the nearest known
                share, in proportion to the removed share; a gene without known shares gets the mean
                of its kind.
            reach: Relative influence of each gene.
            values: Divergence or savings of whole candidates.
        """
        known = dict(table)
        means = {
            kind: self._mean(kind, reach, values) for kind in {g.kind for g in self.space.genes}
        }
        for i, gene in enumerate(self.space.genes):
            of_gene = [(share, value) for (j, share), value in known.items() if j == i]
            for share in gene.shares[1:]:
                if of_gene and (i, share) not in known:
                    near, value = min(of_gene, key=lambda pair: abs(pair[0] - share))
                    table[i, share] = value * (1.0 - share) / (1.0 - near)
                elif not of_gene:
                    table[i, share] = means[gene.kind] * (1.0 - share) * reach[i]

    def _mean(self, kind: str, reach: list[float], values: Mapping[Candidate, float]) -> float:
        """Mean divergence or savings per removed share at a gene.

        The mean is over candidates that change only genes of this kind, or else over all.
        """
        alone: list[float] = []
        mixed: list[float] = []
        for candidate, value in values.items():
            removed_shares = {i: 1.0 - s for i, s in enumerate(candidate.shares) if s < 1.0}
            if candidate.setting == 0 and removed_shares:
                only_kind = all(self.space.genes[i].kind == kind for i in removed_shares)
                removed = sum(reach[i] * removed_shares[i] for i in removed_shares)
                (alone if only_kind else mixed).append(value / removed)
        return max(0.0, fmean(alone or mixed or [0.0]))

    def _learn_factors(self, trials: Mapping[Candidate, Trial]) -> None:
        uniforms = self.space.uniforms()
        keys_only = {c: names["k"] for c, names in uniforms.items() if _keeps_tokens(self.space, c)}
        for candidate, share in keys_only.items():
            trial = trials.get(candidate)
            first = trials.get(Candidate(0, candidate.shares))
            if trial is None or first is None or share == 1.0:
                continue
            saved = (self.space.macs - trial.macs) / ((self.space.macs - first.macs) or 1)
            harm = trial.divergence / first.divergence if first.divergence > 0 else 1.0
            self.key_factors[candidate.setting, share] = (min(harm, 1e6), saved)

    def learn_times(self, trials: Iterable[Trial]) -> None:
        """Fit times to the MACs that keys and tokens save, by least squares over timed trials."""
        timed = [(trial, trial.latency) for trial in trials if trial.latency is not None]
        names = [(s, keys) for s in range(len(self.space.settings)) for keys in (True, False)]
        rows, times = [], []
        for trial, latency in timed:
            keys, tokens = self.saved_shares(trial.candidate)
            # savings of tokens do not depend on options of attention
            filled = {(trial.candidate.setting, True): keys, (0, False): tokens}
            rows.append([filled.get(name, 0.0) for name in names] + [1.0])
            times.append(1.0 - latency)
        if not rows:
            return
        rates = np.linalg.lstsq(np.array(rows), np.array(times), rcond=1e-6)[0]
        self.time_rates = dict(zip(names, map(float, rates), strict=False))
        self.time_overhead = -float(rates[-1])

    def saved_shares(self, candidate: Candidate) -> tuple[float, float]:
        """Estimated savings by fewer keys and by fewer tokens, relative to the dense model's MACs.

        Removed tokens save only once: later savings of tokens shrink with the share of remaining
        tokens, and savings of keys with its square.
        """
        keys = tokens = 0.0
        remaining = 1.0
        for i, (gene, share) in enumerate(zip(self.space.genes, candidate.shares, strict=True)):
            saved = self.saved.get((i, share), 0.0)
            if gene.kind == "k":
                keys += (
                    saved
                    * remaining**2
                    * self.key_factors.get((candidate.setting, share), (1, 1))[1]
                )
            else:
                tokens += saved * remaining
                remaining *= share
        return keys / self.space.macs, tokens / self.space.macs

    def macs(self, candidate: Candidate) -> float:
        """Estimated MACs per image."""
        return self.space.macs * (1.0 - sum(self.saved_shares(candidate)))

    def cost(self, candidate: Candidate) -> float:
        """Estimated share of the dense model's time if times were measured, else of its MACs."""
        keys, tokens = self.saved_shares(candidate)
        if self.time_rates is None:
            return 1.0 - keys - tokens
        by_keys = self.time_rates.get((candidate.setting, True), 0.0) * keys
        return 1.0 + self.time_overhead - by_keys - self.time_rates[0, False] * tokens

    def divergence(self, candidate: Candidate) -> float:
        """Estimated divergence from the dense model."""
        total = 0.0
        for i, (gene, share) in enumerate(zip(self.space.genes, candidate.shares, strict=True)):
            harm = self.harm.get((i, share), 0.0)
            factors = self.key_factors.get((candidate.setting, share), (1.0, 1.0))
            total += harm * (factors[0] if gene.kind == "k" else 1.0)
        return total

    def at_price(self, price: float, start: Candidate) -> Candidate:
        """A candidate that no change of a single gene improves.

        Args:
            price: Price of the dense model's whole cost, in units of divergence.
            start: The candidate to start from; its setting is not changed.
        """
        best, best_cost = start, self.divergence(start) + price * self.cost(start)
        improved = True
        while improved:
            improved = False
            for i, gene in enumerate(self.space.genes):
                for share in gene.shares:
                    shares = (*best.shares[:i], share, *best.shares[i + 1 :])
                    candidate = Candidate(start.setting, shares)
                    cost = self.divergence(candidate) + price * self.cost(candidate)
                    if cost < best_cost - 1e-12:
                        best, best_cost, improved = candidate, cost, True
        return best

    def front(self, points: int = 48) -> list[Candidate]:
        """Candidates from dense to cheap, each the best of its setting for some price.

        These are the solutions of a Lagrangian relaxation of the knapsack problem. Prices ascend,
        so costs descend.
        """
        front: list[Candidate] = []
        for setting in range(len(self.space.settings)):
            candidates = [Candidate(setting, self.space.dense.shares)]
            for i in range(points):
                price = 10 ** (-9 + 14 * i / (points - 1))
                candidates.append(self.at_price(price, candidates[-1]))
            front += candidates
        return [c for c in dict.fromkeys(front) if not self.space.keeps_all(c)]


def _reach(genes: tuple[Gene, ...]) -> list[float]:
    """Influence of genes: removed tokens affect all later blocks, removed keys only their site."""
    last = max((gene.depth for gene in genes), default=0.0) + 1.0
    return [1.0 if gene.kind == "k" else 1.0 - gene.depth / last for gene in genes]


def _keeps_tokens(space: Space, candidate: Candidate) -> bool:
    pairs = list(zip(space.genes, candidate.shares, strict=True))
    keys = any(gene.kind == "k" for gene in space.genes)
    return keys and all(share == 1.0 for gene, share in pairs if gene.kind != "k")


def mutated(
    costs: CostModel, parent: Candidate, limit: float, generator: random.Random
) -> Candidate | None:
    """A random neighbour: one to three genes one step up or down, sometimes other options.

    Args:
        costs: Estimates the neighbour's cost.
        parent: The candidate to change.
        limit: Largest cost of the neighbour.
        generator: Random generator.

    Returns:
        The neighbour; None if it equals the parent or is above the limit.
    """
    genes, shares, setting = costs.space.genes, list(parent.shares), parent.setting
    useful = [
        i
        for i, gene in enumerate(genes)
        if gene.kind != "k" or any((setting, share) not in costs.idle for share in gene.shares[1:])
    ]
    for _ in range(generator.choice((1, 2, 2, 3)) if useful else 0):
        i = generator.choice(useful)
        choices = genes[i].shares
        step = choices.index(shares[i]) + generator.choice((-1, 1))
        shares[i] = choices[min(max(step, 0), len(choices) - 1)]
    if len(costs.space.settings) > 1 and generator.random() < 0.2:
        setting = generator.randrange(len(costs.space.settings))
    child = costs.space.canonical(Candidate(setting, tuple(shares)))
    return child if child != parent and costs.cost(child) <= limit else None
