"""`search`: budgets per site and per block, and options, for one budget of the whole model."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from sparsiattn.analysis.schedule_search.budget import Budget
from sparsiattn.analysis.schedule_search.evaluation import TrialRunner
from sparsiattn.analysis.schedule_search.evolution import Search
from sparsiattn.analysis.schedule_search.plan import Plan, shown
from sparsiattn.analysis.schedule_search.result import SearchResult
from sparsiattn.analysis.schedule_search.settings import (
    OptionsGrid,
    Setting,
    default_grid,
    settings_of,
    without_budgets,
)
from sparsiattn.analysis.schedule_search.space import KEYS, Space, kinds_of, space_of
from sparsiattn.errors import InvalidOption
from sparsiattn.patching import patch_of, resolve
from sparsiattn.patching.model_outputs import Metric
from sparsiattn.runtime.patch_state import unwrap
from sparsiattn.runtime.timing import timed
from sparsiattn.strategies import Config


def search(
    model: nn.Module,
    images: Any,
    budget: Mapping[str, float],
    *,
    strategy: str | Config | None = None,
    keys: Sequence[float] = KEYS,
    tokens: Sequence[float] | None = None,
    options_grid: OptionsGrid | None = None,
    trials: int | None = None,
    rounds: int = 9,
    seed: int = 0,
    budget_s: float | None = None,
    metric: Metric | None = None,
    input: Any = None,
    progress: bool = True,
    **options: Any,
) -> SearchResult:
    """Find how many keys each site and how many tokens each block can do without.

    First it runs uniform schedules, then each change alone, and measures how far the outputs move.
    Sums of these order all schedules (a Lagrangian knapsack, as MACs of blocks multiply with the
    tokens that are left). Then an evolutionary search runs the most promising ones and their
    neighbours. What it returns is at least as good as every uniform schedule that it ran and that
    keeps to the budget: by the least divergence, or the fewest MACs where agreement is the budget.
    Where time is the budget, the best are timed once more, together.

    Args:
        model: A classifier, or a model that returns features. If it is patched, its strategy and
            planners are searched with. It is left as it was: a copy is tried on.
        images: A batch ``[B, 3, H, W]`` or several, unlabelled; some hundreds tell more than noise.
        budget: One of ``{"macs": 0.7}`` (at most this share of the dense model's, or an int: MACs
            per image), ``{"latency": 0.8}`` (of its time on this machine, on the first batch) and
            ``{"agreement": 0.99}`` (the least share of images where the patched model must predict
            as the dense one does, or for features the least mean cosine; MACs as few as can be).
        strategy: What to search with where the model is not patched, as `patch` takes it.
        keys: Shares of keys to choose from.
        tokens: Shares of tokens to choose from at every block. None for steps of 0.1 down to 0.5;
            for ``"token_merge"``, which merges at every block, for 0.98 to 0.8.
        options_grid: Values to choose from for other options of the strategy, one for the whole
            model: ``{"tile": [1, (4, 4)], "background": ["auto", None]}``. None tries tile and
            background of the strategy, ``(4, 4)``, and summary keys on and off, and nothing where
            the model is patched; ``{}`` leaves all options alone.
        trials: Schedules to run on the images at most, all of them counted: uniform ones, single
            changes, and what the search proposes. None for all of the first two and 60 proposals.
            The dense model does not count.
        rounds: Paired runs of each final timing.
        seed: Of the evolutionary search.
        budget_s: Seconds after which no other schedule is run, and the best so far is returned;
            times are measured together once more before that.
        metric: What is compared, ``"classes"``, ``"features"``, or a function of the dense and the
            patched output that gives ``[B]``, 1 where all stays; None for what fits the model.
        input: An image batch or shape, where the model does not say which.
        progress: Whether to say on stderr how much will run and how long that may take, then a bar
            on a terminal, elsewhere a line a minute.
        **options: Of the strategy.

    Returns:
        The schedule, what to pass to `patch` beside it, how it did, and the best uniform one.

    Raises:
        InvalidOption: No schedule meets the budget, the strategy has none, or an argument is out of
            range.
        UnknownName: There is no such option.

    >>> import sparsiattn
    >>> from sparsiattn.testing.hosts import tiny_images, tiny_vit
    >>> model = tiny_vit()
    >>> result = search(
    ...     model, tiny_images(8), {"macs": 0.9}, strategy="token_drop", trials=12, progress=False
    ... )
    >>> result.found.macs <= 0.9 * result.macs_dense
    True
    >>> patch = sparsiattn.patch(model, "token_drop", schedule=result.schedule, **result.options)
    """
    start = time.monotonic()
    asked, host = Budget.read(budget), unwrap(model)
    check_counts(trials, rounds, budget_s)
    key_shares = check_shares(keys, "keys")
    token_shares = None if tokens is None else check_shares(tokens, "tokens")
    base = strategy_of(host, strategy, options)
    timed_by = asked.kind == "latency"
    batches = batches_of(images)
    runner = TrialRunner(host, batches, input, only_if_faster=timed_by, metric=metric)
    if options_grid is None:
        settings = [] if runner.was_patched else settings_of(base, default_grid(base))
        settings = fitting(runner, settings) or [Setting(base)]
    else:
        settings = settings_of(base, options_grid)
    space, patch_seconds = timed(lambda: probe(runner, settings, key_shares, token_shares))
    target = limit_of(asked, space, runner)
    plan = Plan.of(space, trials, rounds if timed_by else 0)
    deadline = float("inf")
    if budget_s is not None:
        deadline = start + budget_s - plan.race_runs * runner.batch_seconds
    with shown(plan.text(runner, patch_seconds), plan.trials, progress) as show:
        runner.tick = show
        job = Search(runner, space, target, plan, random.Random(seed), show, deadline)
        best = job.solve()
    return SearchResult.of(job, best, asked, runner)


def strategy_of(host: nn.Module, strategy: str | Config | None, options: dict[str, Any]) -> Config:
    """The strategy to search with, its budgets of merged tokens as by default."""
    patch = patch_of(host)
    if patch is not None and (strategy is not None or options):
        raise InvalidOption("this model is patched, so its own strategy is searched: no strategy=")
    base = resolve(strategy or "connectivity", None, options) if patch is None else patch.strategy
    kinds_of(base)
    return without_budgets(base)


def probe(
    runner: TrialRunner,
    settings: Sequence[Setting],
    keys: tuple[float, ...],
    tokens: tuple[float, ...] | None,
) -> Space:
    """The space that settings have in this model; every setting is patched once."""
    for setting in settings[1:]:
        with runner.patched(None, setting.strategy):
            pass  # a value that the model cannot have is refused before the long run
    with runner.patched(None, reducing_from_the_start(settings[0].strategy)) as patch:
        return space_of(patch, settings, keys, tokens)


def reducing_from_the_start(strategy: Config) -> Config:
    """A strategy whose tokens leave at the first block: its patch knows of all blocks."""
    kinds = kinds_of(strategy)
    if "keep" in kinds:
        return replace(strategy, layers=(0,), keep=0.5)  # type: ignore[call-arg]
    return replace(strategy, layers=(0,)) if "r" in kinds else strategy  # type: ignore[call-arg]


def fitting(runner: TrialRunner, settings: Sequence[Setting]) -> list[Setting]:
    """Of default settings those that the model's grids allow, the strategy's own first.

    Where it is not known which tokens are patches, tiles and summary keys say nothing.
    """
    if len(settings) < 2 or not any(site.placed for site, _ in runner.survey.sites):
        return list(settings[:1])
    found = list(settings[:1])
    for setting in settings[1:]:
        try:
            with runner.patched(None, setting.strategy):
                found.append(setting)
        except InvalidOption:  # a tile larger than the grid, which nobody asked for
            continue
    return found


def limit_of(budget: Budget, space: Space, runner: TrialRunner) -> Budget:
    """The budget in MACs where a share of them was given, and with its measure."""
    name = "mean cosine" if runner.measure.kind == "features" else "agreement"
    limit = budget.limit
    if budget.kind == "macs" and isinstance(limit, float):
        limit *= space.macs
    return replace(budget, limit=limit, measure=name)


def check_counts(trials: int | None, rounds: int, budget_s: float | None) -> None:
    """Raise `InvalidOption` where a number is out of range."""
    for name, value in (("trials", trials), ("rounds", rounds)):
        if (value is not None or name == "rounds") and (type(value) is not int or value < 1):
            raise InvalidOption(f"{name} must be an int >= 1, got {value!r}")
    number = isinstance(budget_s, (int, float)) and not isinstance(budget_s, bool)
    if budget_s is not None and not (number and budget_s > 0):
        raise InvalidOption(f"budget_s must be seconds > 0, or None, got {budget_s!r}")


def check_shares(shares: Sequence[float], name: str) -> tuple[float, ...]:
    """Shares to choose from, 1 first.

    Raises:
        InvalidOption: There is none, or one is out of range.
    """
    if not shares or not all(isinstance(share, float) and 0 < share <= 1 for share in shares):
        raise InvalidOption(f"{name} must be floats in (0, 1], got {shares!r}")
    return tuple(sorted({1.0, *shares}, reverse=True))


def batches_of(images: Any) -> list[Tensor]:
    """Batches of images, of whatever the user gave.

    Raises:
        InvalidOption: They are none.
    """
    batches = [images] if isinstance(images, Tensor) else list(images)
    batches = [batch[0] if isinstance(batch, (tuple, list)) else batch for batch in batches]
    if not batches or any(not isinstance(x, Tensor) or x.dim() != 4 or not len(x) for x in batches):
        raise InvalidOption("images must be a batch [B, C, H, W], or several, and not empty")
    return batches
