"""`search`: budgets per site and per block for one budget of the whole model."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from sparsiattn.analysis.schedule_search.evaluation import Trial, TrialRunner
from sparsiattn.analysis.schedule_search.pareto import CostModel, mutated
from sparsiattn.analysis.schedule_search.result import SearchResult
from sparsiattn.analysis.schedule_search.space import (
    KEYS,
    TOKENS,
    Choice,
    Space,
    kinds_of,
    space_of,
)
from sparsiattn.errors import InvalidOption
from sparsiattn.patching import patch_of, resolve
from sparsiattn.runtime.patch_state import unwrap
from sparsiattn.strategies import Config
from sparsiattn.training import Progress, bar

BUDGETS = ("macs", "latency", "agreement")


def search(
    model: nn.Module,
    images: Any,
    budget: Mapping[str, float],
    *,
    strategy: str | Config | None = None,
    keys: Sequence[float] = KEYS,
    tokens: Sequence[float] = TOKENS,
    trials: int = 60,
    rounds: int = 9,
    seed: int = 0,
    input: Any = None,
    progress: bool = False,
    **options: Any,
) -> SearchResult:
    """Find how many keys each site and how many tokens each block can do without.

    First it measures the divergence of the predictions for each change alone. Sums of these order
    all schedules (a Lagrangian knapsack, as MACs of blocks multiply with the tokens that are left).
    Then an evolutionary search runs the most promising ones and their neighbours. Uniform schedules
    are among them, so the result is at least as good as the best of those on these images.

    Args:
        model: A classifier. If it is patched, its strategy and planners are searched with. It is
            left as it was: a copy is tried on.
        images: A batch ``[B, 3, H, W]`` or several, unlabelled; some hundreds tell more than noise.
        budget: One of ``{"macs": 0.7}`` (at most this share of the dense model's, or an int: MACs
            per image), ``{"latency": 0.8}`` (of its time on this machine, on the first batch) and
            ``{"agreement": 0.99}`` (the least share of images where the patched model must predict
            as the dense one does; MACs as few as can be).
        strategy: What to search with where the model is not patched, as `patch` takes it.
        keys: Shares of keys to choose from.
        tokens: Shares of tokens to choose from.
        trials: Schedules to run after every share was run alone at every site and block.
        rounds: Paired runs per timing.
        seed: Of the evolutionary search.
        input: An image batch or shape, where the model does not say which.
        progress: Show a bar.
        **options: Of the strategy.

    Returns:
        The schedule, how it did, and the best uniform one for comparison.

    Raises:
        InvalidOption: No schedule meets the budget, the strategy has none, or an argument is out of
            range.

    >>> import sparsiattn
    >>> from sparsiattn.testing.hosts import tiny_images, tiny_vit
    >>> model = tiny_vit()
    >>> result = search(model, tiny_images(8), {"macs": 0.9}, strategy="token_drop", trials=4)
    >>> result.found.macs <= 0.9 * result.macs_dense
    True
    >>> patch = sparsiattn.patch(model, "token_drop", schedule=result.schedule)
    """
    host = unwrap(model)
    kind, bound = _checked_budget(budget)
    patch = patch_of(host)
    if patch is not None and (strategy is not None or options):
        raise InvalidOption("this model is patched, so its own strategy is searched: no strategy=")
    base = resolve(strategy or "connectivity", None, options) if patch is None else patch.strategy
    probe = base
    if "keep" in kinds_of(base):  # tokens leave at the first block: the patch knows of all blocks
        probe = replace(base, layers=(0,), keep=0.5)  # type: ignore[call-arg]
    runner = TrialRunner(host, base, _batches(images), input, only_if_faster=kind == "latency")
    with runner.patched(None, probe) as probed:
        space = space_of(probed, _shares(keys, "keys"), _shares(tokens, "tokens"))
    limit = bound * space.macs if kind == "macs" and isinstance(bound, float) else bound
    singles = sum(len(gene.shares) - 1 for gene in space.genes)
    with bar("searching", singles + trials, shown=progress) as advance:
        costs = CostModel(space)
        job = Search(runner, space, costs, trials, rounds, random.Random(seed), advance)
        job.measure_singles()
        best = job.solve(Budget(kind, limit))
        uniform = job.best_uniform(Budget(kind, limit))
    return SearchResult(
        strategy=base.to_dict(),
        budget={kind: bound},
        schedule=space.schedule(best.choice),
        found=best,
        uniform=uniform,
        uniform_shares=None if uniform is None else space.uniforms()[uniform.choice],
        uniform_schedule=None if uniform is None else space.schedule(uniform.choice),
        macs_dense=space.macs,
        images=sum(len(batch) for batch in runner.images),
        trials=len(runner.trials),
    )


def _checked_budget(budget: Mapping[str, float]) -> tuple[str, float]:
    choices = f"one of {', '.join(f'{{{name!r}: ...}}' for name in BUDGETS)}"
    if not isinstance(budget, Mapping) or len(budget) != 1 or next(iter(budget)) not in BUDGETS:
        raise InvalidOption(f"budget must be {choices}, got {budget!r}")
    kind, bound = next(iter(budget.items()))
    number = isinstance(bound, (int, float)) and not isinstance(bound, bool)
    most = float("inf") if kind == "macs" and isinstance(bound, int) else 1.0
    if not number or not 0 < bound <= most:
        raise InvalidOption(f"the budget of {kind} must be in (0, 1], got {bound!r}")
    return kind, bound


def _shares(shares: Sequence[float], name: str) -> tuple[float, ...]:
    if not shares or not all(isinstance(share, float) and 0 < share <= 1 for share in shares):
        raise InvalidOption(f"{name} must be floats in (0, 1], got {shares!r}")
    return tuple(sorted({1.0, *shares}, reverse=True))


def _batches(images: Any) -> list[Tensor]:
    batches = [images] if isinstance(images, Tensor) else list(images)
    batches = [batch[0] if isinstance(batch, (tuple, list)) else batch for batch in batches]
    if not batches or any(not isinstance(x, Tensor) or x.dim() != 4 or not len(x) for x in batches):
        raise InvalidOption("images must be a batch [B, C, H, W], or several, and not empty")
    return batches


@dataclass(frozen=True)
class Budget:
    """What a schedule must keep to, and which of those that do is the best.

    Attributes:
        kind: One of `BUDGETS`.
        limit: MACs per image or time over the dense model's at most, or agreement at least.
    """

    kind: str
    limit: float

    def met_by(self, trial: Trial) -> bool:
        """Whether a trial keeps to it; not where its time was not measured."""
        if self.kind == "agreement":
            return trial.agreement >= self.limit
        cost = trial.macs if self.kind == "macs" else trial.latency
        return cost is not None and cost <= self.limit

    def order(self, trial: Trial) -> tuple[float, float]:
        """The least is the best."""
        if self.kind == "agreement":
            return trial.macs, trial.divergence
        return trial.divergence, trial.macs

    def __str__(self) -> str:
        if self.kind == "macs":
            return f"MACs <= {self.limit:.4g}"
        if self.kind == "agreement":
            return f"agreement >= {self.limit}"
        return f"time <= {self.limit} of the dense model's"


@dataclass
class Search:
    """One search under way.

    Attributes:
        runner: Runs choices on a copy of the model.
        space: What there is to choose.
        costs: Estimates from the single changes that were run.
        trials: Choices to run, those of single changes apart.
        rounds: Paired runs for each time.
        generator: Draws neighbours.
        advance: Called with the number of choices run.
    """

    runner: TrialRunner
    space: Space
    costs: CostModel
    trials: int
    rounds: int
    generator: random.Random
    advance: Progress

    def run(self, choice: Choice) -> Trial:
        """The trial of a choice."""
        trial = self.runner.run(self.space, choice)
        self.advance(len(self.runner.trials))
        return trial

    def measure_singles(self) -> None:
        """Harm and saving of every share at every gene, all else dense."""
        for i, gene in enumerate(self.space.genes):
            for share in gene.shares[1:]:
                choice = (*self.space.dense[:i], share, *self.space.dense[i + 1 :])
                trial = self.run(choice)
                self.costs.harm[i, share] = trial.divergence
                self.costs.saved[i, share] = float(self.space.macs - trial.macs)

    def solve(self, budget: Budget) -> Trial:
        """The best trial within a budget.

        Raises:
            InvalidOption: No schedule meets it.
        """
        if budget.kind == "macs":
            return self._within_macs(budget, self.trials)
        if budget.kind == "agreement":
            return self._agreeing(budget)
        return self._fast(budget)

    def best_uniform(self, budget: Budget) -> Trial | None:
        """The best uniform schedule within a budget; all of them are run."""
        trials = [self.run(choice) for choice in self.space.uniforms()]
        if budget.kind == "latency":
            trials = [self.runner.timed(self.space, trial, self.rounds) for trial in trials]
        return min(filter(budget.met_by, trials), key=budget.order, default=None)

    def _within_macs(self, budget: Budget, runs: int) -> Trial:
        """The least divergence for so many MACs, with so many new runs."""
        candidates = [*self.costs.front(), *self.space.uniforms()]
        fitting = [c for c in candidates if self.costs.macs(c) <= 1.02 * budget.limit]
        fitting.sort(key=self.costs.divergence)
        self._evolve(fitting[: max(4, runs // 3)], budget, runs)
        return self._best_or_raise(budget)

    def _agreeing(self, budget: Budget) -> Trial:
        """The fewest MACs that keep the predictions."""
        front = sorted([*self.space.uniforms(), *self.costs.front()], key=self.costs.macs)
        low, high, runs = 0, len(front) - 1, self.trials
        while low < high:  # agreement falls with MACs, nearly
            middle = (low + high) // 2
            if budget.met_by(self.run(front[middle])):
                high = middle
            else:
                low = middle + 1
            runs -= 1
        self.run(self.space.dense)
        self._evolve([], budget, max(0, runs))
        return self._best_or_raise(budget)

    def _fast(self, budget: Budget) -> Trial:
        """The least divergence for so much time.

        The dearest schedule of the front that is measured to keep to it, or one that the search
        finds for its MACs.
        """
        front = sorted(self.costs.front(), key=self.costs.macs)
        low, high = 0, len(front) - 1
        while low <= high:
            middle = (low + high) // 2
            # an estimate may be too low: with its MACs alone, nothing might fit
            most = max(self.costs.macs(front[middle]), self.run(front[middle]).macs) * 1.001 + 1
            trial = self._within_macs(Budget("macs", most), self.trials // 6 + 1)
            if budget.met_by(self.runner.timed(self.space, trial, self.rounds)):
                low = middle + 1
            else:
                high = middle - 1
        return self._best_or_raise(budget)

    def _evolve(self, candidates: Iterable[Choice], budget: Budget, runs: int) -> None:
        """Run the candidates, then neighbours of the best so far, as long as runs are left."""
        trials = self.runner.trials
        until, dense = len(trials) + runs, Trial(self.space.dense, 0.0, 1.0, self.space.macs)
        for choice in candidates:
            if len(trials) < until:
                self.run(choice)
        for _ in range(50 * runs):  # draws may repeat, so they are bounded as well
            if len(trials) >= until:
                return
            parent = self._best(budget) or dense
            most = budget.limit if budget.kind == "macs" else float(parent.macs)
            child = mutated(self.costs, parent.choice, most, self.generator)
            if child is not None and child not in trials:
                self.run(child)

    def _best(self, budget: Budget) -> Trial | None:
        trials = filter(budget.met_by, self.runner.trials.values())
        return min(trials, key=budget.order, default=None)

    def _best_or_raise(self, budget: Budget) -> Trial:
        best = self._best(budget)
        if best is not None:
            return best
        cheapest = min(self.runner.trials.values(), key=lambda trial: trial.macs)
        raise InvalidOption(
            f"no schedule of {self.runner.strategy.name!r} met {budget}: the cheapest of "
            f"{len(self.runner.trials)} tried has {cheapest.macs:,} of {self.space.macs:,} MACs; "
            "allow more, offer smaller shares (keys=, tokens=), or search 'hybrid'"
        )
