"""`search`: budgets per site and per block for one budget of the whole model."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from sparsiattn.analysis.schedule_search.evaluation import Trial, Trials
from sparsiattn.analysis.schedule_search.pareto import Model, mutated
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
from sparsiattn.patching.apply import resolve
from sparsiattn.patching.handle import patch_of
from sparsiattn.runtime.patch_state import unwrap
from sparsiattn.strategies.config import Config
from sparsiattn.training.progress import bar

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

    model: a classifier; if it is patched, its strategy and planners are searched with, else
    ``strategy`` with ``options``, as `patch` takes them. It is left as it was: a copy is tried on.
    images: a batch ``[B, 3, H, W]`` or several, unlabelled; some hundreds tell more than noise.
    budget: one of ``{"macs": 0.7}`` (at most this share of the dense model's, or an int: MACs per
    image), ``{"latency": 0.8}`` (of its time on this machine, on the first batch) and
    ``{"agreement": 0.99}`` (the least share of images where the patched model must predict as the
    dense one does; MACs as few as can be). keys, tokens: shares to choose from. trials: schedules
    to run after every share was run alone at every site and block. rounds: paired runs per timing.
    seed: of the evolutionary search. input: an image batch or shape, where the model does not say
    which. progress: show a bar.

    First the divergence of the predictions is measured for each change alone; sums of these order
    all schedules (a Lagrangian knapsack, as MACs of blocks multiply with the tokens that are left);
    then an evolutionary search runs the most promising ones and their neighbours, uniform schedules
    among them, so what is found is at least as good as the best of those on these images.

    Raises `InvalidOption` for a budget that no schedule meets, or a strategy that has none.

    >>> import sparsiattn
    >>> from sparsiattn.testing.hosts import tiny_images, tiny_vit
    >>> model = tiny_vit()
    >>> found = search(model, tiny_images(8), {"macs": 0.9}, strategy="token_drop", trials=4)
    >>> found.found.macs <= 0.9 * found.macs_dense
    True
    >>> patch = sparsiattn.patch(model, "token_drop", schedule=found.schedule)
    """
    host = unwrap(model)
    kind, bound = _budget(budget)
    live = patch_of(host)
    if live is not None and (strategy is not None or options):
        raise InvalidOption("this model is patched, so its own strategy is searched: no strategy=")
    base = resolve(strategy or "connectivity", None, options) if live is None else live.strategy
    kinds = kinds_of(base)
    runner = Trials(host, base, _batches(images), input, faster=kind == "latency")
    with runner.patched(None, _probe(base, kinds)) as probe:
        space = space_of(probe, _shares(keys, "keys"), _shares(tokens, "tokens"))
    with bar("searching", _singles(space) + trials, shown=progress) as advance:
        job = Search(runner, space, trials, rounds, random.Random(seed), advance)
        job.measure_singles()
        found = job.solve(kind, bound)
        shares, uniform = job.best_uniform(kinds, kind, bound)
    return SearchResult(
        strategy=base.to_dict(), budget={kind: bound}, schedule=space.schedule(found.choice),
        found=found, uniform=uniform, uniform_shares=shares,
        uniform_schedule=None if uniform is None else space.schedule(uniform.choice),
        macs_dense=space.macs, images=sum(len(x) for x in runner.images), trials=len(runner.seen),
    )  # fmt: skip


def _budget(budget: Mapping[str, float]) -> tuple[str, float]:
    wanted = f"one of {', '.join(f'{{{name!r}: ...}}' for name in BUDGETS)}"
    if not isinstance(budget, Mapping) or len(budget) != 1 or next(iter(budget)) not in BUDGETS:
        raise InvalidOption(f"budget must be {wanted}, got {budget!r}")
    kind, bound = next(iter(budget.items()))
    number = isinstance(bound, (int, float)) and not isinstance(bound, bool)
    most = float("inf") if kind == "macs" and isinstance(bound, int) else 1.0
    if not number or not 0 < bound <= most:
        raise InvalidOption(f"the budget of {kind} must be in (0, 1], got {bound!r}")
    return kind, bound


def _shares(shares: Sequence[float], name: str) -> tuple[float, ...]:
    good = all(isinstance(share, float) and 0 < share <= 1 for share in shares)
    if not good or not shares:
        raise InvalidOption(f"{name} must be floats in (0, 1], got {shares!r}")
    return tuple(sorted({1.0, *shares}, reverse=True))


def _batches(images: Any) -> list[Tensor]:
    found = [images] if isinstance(images, Tensor) else [
        batch[0] if isinstance(batch, (tuple, list)) else batch for batch in images
    ]  # fmt: skip
    if not found or any(not isinstance(x, Tensor) or x.dim() != 4 or not len(x) for x in found):
        raise InvalidOption("images must be a batch [B, C, H, W], or several, and not empty")
    return found


def _probe(base: Config, kinds: list[str]) -> Config:
    """With tokens that leave at the first block, so that the patch knows of all blocks."""
    return replace(base, layers=(0,), keep=0.5) if "keep" in kinds else base  # type: ignore[call-arg]


def _singles(space: Space) -> int:
    return sum(len(gene.shares) - 1 for gene in space.genes)


class Search:
    """One search under way."""

    def __init__(
        self, runner: Trials, space: Space, trials: int, rounds: int, generator: random.Random,
        advance: Callable[..., Any],
    ) -> None:  # fmt: skip
        self.runner, self.space, self.trials, self.rounds = runner, space, trials, rounds
        self.generator, self.advance = generator, advance
        self.model = Model(space, {}, {})

    def run(self, choice: Choice) -> Trial:
        found = self.runner.run(self.space, choice)
        self.advance(len(self.runner.seen))
        return found

    def measure_singles(self) -> None:
        """Harm and saving of every share at every gene, all else dense."""
        for i, gene in enumerate(self.space.genes):
            for share in gene.shares[1:]:
                choice = (*self.space.dense[:i], share, *self.space.dense[i + 1 :])
                found = self.run(choice)
                self.model.harm[i, share] = found.divergence
                self.model.saved[i, share] = float(self.space.macs - found.macs)

    def solve(self, kind: str, bound: float) -> Trial:
        if kind == "macs":
            most = bound if isinstance(bound, int) else bound * self.space.macs
            return self.within(most, self.trials)
        if kind == "agreement":
            return self.agreeing(bound)
        return self.fast(bound)

    def within(self, budget: float, runs: int) -> Trial:
        """The least divergence for so many MACs, with so many new runs."""
        first = [c for c in self.model.front() if self.model.macs(c) <= 1.02 * budget]
        first += [c for c, _ in self.uniforms() if self.model.macs(c) <= 1.02 * budget]
        ranked = sorted(first, key=self.model.divergence)

        def best() -> Trial | None:
            fit = [trial for trial in self.runner.seen.values() if trial.macs <= budget]
            return min(fit, key=lambda trial: (trial.divergence, trial.macs), default=None)

        self.evolve(ranked[: max(4, runs // 3)], best, budget, runs)
        return self._met(best(), f"MACs <= {budget:.4g}")

    def agreeing(self, floor: float) -> Trial:
        """The fewest MACs that keep the predictions."""

        def best() -> Trial | None:
            fit = [trial for trial in self.runner.seen.values() if trial.agreement >= floor]
            return min(fit, key=lambda trial: (trial.macs, trial.divergence), default=None)

        front = [c for c, _ in self.uniforms()] + self.model.front()
        front = sorted(front, key=self.model.macs)
        low, high, tried = 0, len(front) - 1, list[Choice]()
        while low < high:  # agreement falls with MACs, nearly
            middle = (low + high) // 2
            tried.append(front[middle])
            low, high = (low, middle) if self._agrees(front[middle], floor) else (middle + 1, high)
        self.run(self.space.dense)
        self.evolve([], best, None, max(0, self.trials - len(tried)))
        return self._met(best(), f"agreement >= {floor}")

    def _agrees(self, choice: Choice, floor: float) -> bool:
        return self.run(choice).agreement >= floor

    def fast(self, bound: float) -> Trial:
        """The least divergence for so much time: the dearest schedule of the front, and of those
        that the search finds for its MACs, that is measured to keep to it."""
        front = sorted(self.model.front(), key=self.model.macs)
        fit: list[Trial] = []
        low, high = 0, len(front) - 1
        while low <= high:
            middle = (low + high) // 2
            # the model is an estimate: with what it says alone, nothing might fit
            most = max(self.model.macs(front[middle]), self.run(front[middle]).macs) * 1.001 + 1
            trial = self._timed(self.within(most, self.trials // 6 + 1))
            if trial.latency is not None and trial.latency <= bound:
                fit.append(trial)
                low = middle + 1
            else:
                high = middle - 1
        best = min(fit, key=lambda trial: trial.divergence, default=None)
        return self._met(best, f"time <= {bound} of the dense model's")

    def _timed(self, trial: Trial) -> Trial:
        if trial.latency is None and trial.choice != self.space.dense:
            time = self.runner.latency(self.space, trial.choice, self.rounds)
            trial = self.runner.seen[trial.choice] = replace(trial, latency=time)
        return replace(trial, latency=1.0) if trial.choice == self.space.dense else trial

    def evolve(
        self, first: Iterable[Choice], best: Callable[[], Trial | None], budget: float | None,
        runs: int,
    ) -> None:  # fmt: skip
        """Run the first choices, then neighbours of the best so far, as long as runs are left."""
        until = len(self.runner.seen) + runs
        for choice in first:
            if len(self.runner.seen) < until:
                self.run(choice)
        for _ in range(50 * runs):
            if len(self.runner.seen) >= until:
                return
            parent = best()
            start = self.space.dense if parent is None else parent.choice
            most = float(parent.macs if parent else self.space.macs) if budget is None else budget
            child = mutated(self.model, start, most, self.generator)
            if child is not None and child not in self.runner.seen:
                self.run(child)

    def uniforms(self) -> list[tuple[Choice, dict[str, float]]]:
        """Equal shares everywhere; tokens leave at a quarter, half and three quarters."""
        blocks = [i for i, gene in enumerate(self.space.genes) if gene.kind == "keep"]
        drops = tuple(sorted({blocks[len(blocks) * q // 4] for q in (1, 2, 3)})) if blocks else ()
        shares = {gene.kind: gene.shares for gene in self.space.genes}
        found: dict[Choice, dict[str, float]] = {}
        for k in shares.get("k", (1.0,)):
            for keep in shares.get("keep", (1.0,)):
                said = {"k": k, "keep": keep}
                choice = self.space.uniform(k, keep, drops)
                found.setdefault(choice, {kind: said[kind] for kind in shares})
        return [(choice, said) for choice, said in found.items() if choice != self.space.dense]

    def best_uniform(
        self, kinds: list[str], kind: str, bound: float
    ) -> tuple[dict[str, float] | None, Trial | None]:
        """The best uniform schedule within the same budget; all that could be are run."""
        fit = []
        for choice, said in self.uniforms():
            trial = self.run(choice)
            if kind == "latency":
                trial = self._timed(trial)
            if self._fits(trial, kind, bound):
                fit.append((trial, said))
        if not fit:
            return None, None
        by_macs = kind == "agreement"
        trial, said = min(fit, key=lambda one: one[0].macs if by_macs else one[0].divergence)
        return said, trial

    def _fits(self, trial: Trial, kind: str, bound: float) -> bool:
        if kind == "macs":
            return trial.macs <= (bound if isinstance(bound, int) else bound * self.space.macs)
        if kind == "agreement":
            return trial.agreement >= bound
        return trial.latency is not None and trial.latency <= bound

    def _met(self, best: Trial | None, words: str) -> Trial:
        if best is not None:
            return best
        cheapest = min(self.runner.seen.values(), key=lambda trial: trial.macs)
        raise InvalidOption(
            f"no schedule of {self.runner.base.name!r} met {words}: the cheapest of "
            f"{len(self.runner.seen)} tried has {cheapest.macs:,} of {self.space.macs:,} MACs; "
            "allow more, offer smaller shares (keys=, tokens=), or search 'hybrid'"
        )
