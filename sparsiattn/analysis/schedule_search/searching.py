"""`search`: find budgets per site and per block, and options, for one budget of the model."""

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
    """Search the share of keys at each site and of tokens at each block for a budget.

    It runs uniform schedules first, then each change alone, and measures how far the outputs move.
    Sums of these estimates rank all schedules (a Lagrangian knapsack, as the MACs of blocks
    multiply with the remaining tokens). Then an evolutionary search runs the most promising
    schedules and their neighbours. The result is at least as good as every uniform schedule that
    was run and meets the budget: by divergence, or by MACs for a budget of agreement. For a budget
    of time, the best schedules are timed once more together.

    Args:
        model: A classifier, or a model that returns features. A patched model is searched with its
            own strategy and planners. The search uses a copy, so the model is not changed.
        images: One or more unlabelled batches ``[B, 3, H, W]``; use some hundreds of images, as few
            images give noisy results.
        budget: One of ``{"macs": 0.7}`` (largest share of the dense model's MACs, or an int of MACs
            per image), ``{"latency": 0.8}`` (largest share of its time on this machine, on the
            first batch) and ``{"agreement": 0.99}`` (smallest share of images with the same
            prediction, or smallest mean cosine of features; MACs are minimised).
        strategy: The strategy for an unpatched model, as in `patch`.
        keys: Shares of keys to choose from.
        tokens: Shares of tokens to choose from at every block. None for steps of 0.1 down to 0.5;
            for ``"token_merge"``, which merges at every block, for 0.98 to 0.8.
        options_grid: Values to choose from for other options of the strategy, the same in the whole
            model: ``{"tile": [1, (4, 4)], "background": ["auto", None]}``. None tries the
            strategy's tile and ``(4, 4)``, each with and without summary keys, or nothing if the
            model is patched; ``{}`` keeps all options.
        trials: Largest number of schedules to run on the images: uniform ones, single changes, and
            proposals of the search. None for all uniform ones, all single changes and 60 proposals.
            The dense model does not count.
        rounds: Number of paired runs of each final timing.
        seed: Seed of the evolutionary search.
        budget_s: Time limit in seconds, after which the best schedule so far is returned; it
            includes the final timings. None for no limit.
        metric: The comparison: ``"classes"``, ``"features"``, or a function of the dense and the
            patched output that returns ``[B]``, with 1 for no change. None to choose by the model.
        input: An image batch or shape, if the model's input size is not known.
        progress: Whether to show on stderr the planned number of forward passes and the expected
            time, then a bar on a terminal, or else one line per minute.
        **options: Options of the strategy.

    Returns:
        The schedule, the other options for `patch`, its results, and the best uniform schedule.

    Raises:
        InvalidOption: No schedule meets the budget, the strategy has no schedule, or an argument is
            out of range.
        UnknownName: An option is unknown.

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
    user_budget, host = Budget.read(budget), unwrap(model)
    check_counts(trials, rounds, budget_s)
    key_shares = check_shares(keys, "keys")
    token_shares = None if tokens is None else check_shares(tokens, "tokens")
    base = strategy_of(host, strategy, options)
    by_time = user_budget.kind == "latency"
    batches = batches_of(images)
    runner = TrialRunner(host, batches, input, only_if_faster=by_time, metric=metric)
    if options_grid is None:
        settings = [] if runner.was_patched else settings_of(base, default_grid(base))
        settings = fitting(runner, settings) or [Setting(base)]
    else:
        settings = settings_of(base, options_grid)
    space, patch_seconds = timed(lambda: probe(runner, settings, key_shares, token_shares))
    target = limit_of(user_budget, space, runner)
    plan = Plan.of(space, trials, rounds if by_time else 0)
    deadline = float("inf")
    if budget_s is not None:
        deadline = start + budget_s - plan.race_runs * runner.batch_seconds
    with shown(plan.text(runner, patch_seconds), plan.trials, progress) as show:
        runner.tick = show
        job = Search(runner, space, target, plan, random.Random(seed), show, deadline)
        best = job.solve()
    return SearchResult.of(job, best, user_budget, runner)


def strategy_of(host: nn.Module, strategy: str | Config | None, options: dict[str, Any]) -> Config:
    """The strategy to search with, with default numbers of merged tokens."""
    patch = patch_of(host)
    if patch is not None and (strategy is not None or options):
        raise InvalidOption(
            "this model is patched, so search() uses its strategy: remove strategy= and options, "
            "or call unpatch() first"
        )
    base = resolve(strategy or "connectivity", None, options) if patch is None else patch.strategy
    kinds_of(base)
    return without_budgets(base)


def probe(
    runner: TrialRunner,
    settings: Sequence[Setting],
    keys: tuple[float, ...],
    tokens: tuple[float, ...] | None,
) -> Space:
    """The search space of settings in this model; every setting is patched once."""
    for setting in settings[1:]:
        with runner.patched(None, setting.strategy):
            pass  # raises for a value that the model does not support, before the long search
    with runner.patched(None, reducing_from_the_start(settings[0].strategy)) as patch:
        return space_of(patch, settings, keys, tokens)


def reducing_from_the_start(strategy: Config) -> Config:
    """A strategy that reduces tokens at the first block, so that its patch includes all blocks."""
    kinds = kinds_of(strategy)
    if "keep" in kinds:
        return replace(strategy, layers=(0,), keep=0.5)  # type: ignore[call-arg]
    return replace(strategy, layers=(0,)) if "r" in kinds else strategy  # type: ignore[call-arg]


def fitting(runner: TrialRunner, settings: Sequence[Setting]) -> list[Setting]:
    """The default settings that the model's grids support, the strategy's own first.

    If the positions of tokens are not known, tiles and summary keys have no effect.
    """
    if len(settings) < 2 or not any(site.placed for site, _ in runner.survey.sites):
        return list(settings[:1])
    supported = list(settings[:1])
    for setting in settings[1:]:
        try:
            with runner.patched(None, setting.strategy):
                supported.append(setting)
        except InvalidOption:  # for example, a default tile larger than the grid
            continue
    return supported


def limit_of(budget: Budget, space: Space, runner: TrialRunner) -> Budget:
    """The budget with its measure, and with a share of MACs converted to MACs."""
    name = "mean cosine" if runner.measure.kind == "features" else "agreement"
    limit = budget.limit
    if budget.kind == "macs" and isinstance(limit, float):
        limit *= space.macs
    return replace(budget, limit=limit, measure=name)


def check_counts(trials: int | None, rounds: int, budget_s: float | None) -> None:
    """Raise `InvalidOption` if a number is out of range."""
    for name, value in (("trials", trials), ("rounds", rounds)):
        if (value is not None or name == "rounds") and (type(value) is not int or value < 1):
            raise InvalidOption(f"{name} must be an int >= 1, got {value!r}")
    number = isinstance(budget_s, (int, float)) and not isinstance(budget_s, bool)
    if budget_s is not None and not (number and budget_s > 0):
        raise InvalidOption(f"budget_s must be seconds > 0, or None, got {budget_s!r}")


def check_shares(shares: Sequence[float], name: str) -> tuple[float, ...]:
    """Sort shares to choose from, 1 first.

    Raises:
        InvalidOption: There are no shares, or one is out of range.
    """
    if not shares or not all(isinstance(share, float) and 0 < share <= 1 for share in shares):
        raise InvalidOption(f"{name} must be floats in (0, 1], got {shares!r}")
    return tuple(sorted({1.0, *shares}, reverse=True))


def batches_of(images: Any) -> list[Tensor]:
    """The user's images as a list of batches.

    Raises:
        InvalidOption: They are not batches of images.
    """
    batches = [images] if isinstance(images, Tensor) else list(images)
    batches = [batch[0] if isinstance(batch, (tuple, list)) else batch for batch in batches]
    if not batches or any(not isinstance(x, Tensor) or x.dim() != 4 or not len(x) for x in batches):
        raise InvalidOption("images must be a batch [B, C, H, W], or several, and not empty")
    return batches
