"""`SearchResult`: the result of `search`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import Any

from sparsiattn.analysis.schedule_search.budget import Budget
from sparsiattn.analysis.schedule_search.evaluation import Trial, TrialRunner
from sparsiattn.analysis.schedule_search.evolution import Search
from sparsiattn.analysis.schedule_search.settings import patch_options
from sparsiattn.patching.text import macs_text
from sparsiattn.strategies import Config, Hybrid

Schedule = dict[str, dict[str, Any]]

LABELS = {
    "classes": ("agreement", "divergence"),
    "features": ("mean cosine", "1 - cosine"),
    "callable": ("metric", "1 - metric"),
}


@dataclass(frozen=True)
class SearchResult:
    """A schedule that meets a budget.

    Attributes:
        strategy: The strategy with the options that were found, in JSON form.
        budget: The budget passed to `search`.
        schedule: ``{"k": {site: share}, "keep": {block: share}}``; with ``"r"``, the number of
            tokens to merge by block.
        found: The results of the schedule on the images.
        uniform: The best schedule with equal shares that meets the budget, for comparison; None if
            there is none.
        uniform_shares: Shares of the uniform schedule; None if there is none.
        uniform_schedule: The uniform schedule; None if there is none.
        macs_dense: MACs of the dense model per image.
        images: Number of images.
        trials: Number of schedules that were run on the images.
        options: Options to pass to `patch` in addition to strategy and schedule.
        uniform_options: The same for the uniform schedule.
        measure: The comparison: ``"classes"``, ``"features"`` or ``"callable"``.
        trials_planned: Largest number of schedules to run. Fewer were run if the time limit
            ``budget_s`` was reached or there was nothing new to propose.
        uniform_trials: Number of uniform schedules that were run.
        out_of_time: Whether the time limit ``budget_s`` was reached.

    >>> import sparsiattn
    >>> from sparsiattn.testing.hosts import tiny_images, tiny_vit
    >>> options = {"strategy": "token_drop", "trials": 6, "progress": False}
    >>> result = sparsiattn.search(tiny_vit(), tiny_images(4), {"macs": 0.9}, **options)
    >>> result.strategy["name"], result.images, result.call[:36]
    ('token_drop', 4, "sparsiattn.patch(model, 'token_drop'")
    """

    strategy: Mapping[str, Any]
    budget: Mapping[str, float]
    schedule: Schedule
    found: Trial
    uniform: Trial | None
    uniform_shares: dict[str, float] | None
    uniform_schedule: Schedule | None
    macs_dense: int
    images: int
    trials: int
    options: dict[str, Any] = field(default_factory=dict)
    uniform_options: dict[str, Any] | None = None
    measure: str = "classes"
    trials_planned: int = 0
    uniform_trials: int = 0
    out_of_time: bool = False

    @classmethod
    def of(cls, job: Search, found: Trial, budget: Budget, runner: TrialRunner) -> SearchResult:
        """The result of a finished search."""
        space, uniform, late = job.space, job.best_uniform(), job.is_late
        strategies = [setting.strategy for setting in space.settings]
        chosen = strategies[found.candidate.setting]
        result = cls(
            strategy=chosen.to_dict(),
            budget={budget.kind: budget.limit},
            schedule=space.schedule(found.candidate),
            found=found,
            uniform=None,
            uniform_shares=None,
            uniform_schedule=None,
            macs_dense=space.macs,
            images=sum(map(len, runner.images)),
            trials=len(job.trials),
            options=options_of(chosen, runner.only_if_faster),
            measure=runner.measure.kind,
            trials_planned=job.plan.trials,
            uniform_trials=len(job.uniforms & job.trials.keys()),
            out_of_time=late and len(job.trials) < job.plan.trials,
        )
        if uniform is None:
            return result
        return replace(
            result,
            uniform=uniform,
            uniform_shares=space.uniforms()[uniform.candidate],
            uniform_schedule=space.schedule(uniform.candidate),
            uniform_options=options_of(
                strategies[uniform.candidate.setting], runner.only_if_faster
            ),
        )

    @property
    def call(self) -> str:
        """The line of Python that patches a model with the result."""
        return self.call_with(repr(self.schedule))

    def call_with(self, schedule: str) -> str:
        """The line of Python that patches a model.

        Args:
            schedule: Source code of the schedule, or of the name of its file.
        """
        options = [f"{name}={value!r}" for name, value in self.options.items()]
        arguments = ["model", repr(self.strategy["name"]), f"schedule={schedule}", *options]
        return f"sparsiattn.patch({', '.join(arguments)})"

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        content = asdict(replace(self, options={}, uniform_options=None))
        for name in ("found", "uniform"):
            if content[name] is not None:
                content[name].pop("candidate")
        uniform_options = None if self.uniform_options is None else plain(self.uniform_options)
        return {**content, "options": plain(self.options), "uniform_options": uniform_options}

    def save(self, path: str | PathLike[str]) -> Path:
        """Write the schedule as JSON, with the other fields under ``about``.

        Args:
            path: The file, which `patch` takes as ``schedule=``, together with `options`.

        Returns:
            The path.
        """
        about = self.to_dict()
        schedule = about.pop("schedule")
        about["patch"] = self.call_with(repr(str(path)))
        path = Path(path)
        text = json.dumps({**schedule, "about": about}, indent=2)
        path.write_text(text + "\n", encoding="utf-8")
        return path

    def __str__(self) -> str:
        budget = ", ".join(f"{name}={value:g}" for name, value in self.budget.items())
        lines = [f"{self.strategy['name']}, {budget}: {self._text(self.found)}"]
        if self.uniform is not None and self.uniform_shares is not None:
            shares = {**self.uniform_shares, **(self.uniform_options or {})}
            shares.pop("only_if_faster", None)
            named = ", ".join(f"{name}={value}" for name, value in shares.items())
            same = self.uniform.candidate == self.found.candidate
            figures = "the same, nothing better was found" if same else self._text(self.uniform)
            lines.append(f"best of {self.uniform_trials} uniform ({named}): {figures}")
        else:
            lines.append(f"none of {self.uniform_trials} uniform schedules meets this budget")
        early = f" of {self.trials_planned} until the time limit" if self.out_of_time else ""
        lines.append(f"{self.trials} trials on {self.images} images{early}")
        if self.found.divergence == 0 and self.found.macs == self.macs_dense:
            lines.append("no schedule within this budget is better than the unpatched model")
        for kind, budgets in self.schedule.items():
            parts = [f"{n} {v:g}" for n, v in budgets.items() if v != (0 if kind == "r" else 1)]
            lines.append(f"{kind}: {', '.join(parts) or 'all'}")
        return "\n".join([*lines, self.call])

    # a terminal or notebook shows the last value by its repr
    __repr__ = __str__

    def _text(self, trial: Trial) -> str:
        percent = 100 * trial.macs / max(1, self.macs_dense)
        time = "" if trial.latency is None else f", {trial.latency:.2f} of dense time"
        kept, lost = LABELS[self.measure]
        share = (
            f"{100 * trial.agreement:.2f} %"
            if self.measure == "classes"
            else (f"{trial.agreement:.4f}")
        )
        return (
            f"{macs_text(trial.macs)} MACs ({percent:.1f} % of dense){time}, {kept} {share}, "
            f"{lost} {trial.divergence:.4g}"
        )


def options_of(strategy: Config, only_if_faster: bool) -> dict[str, Any]:
    """Options of `patch` besides name and schedule that differ from their defaults."""
    options = patch_options(strategy)
    if only_if_faster != isinstance(strategy, Hybrid):  # the default of `patch`
        options["only_if_faster"] = only_if_faster
    return options


def plain(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as plain data for JSON."""
    return {n: v.to_dict() if isinstance(v, Config) else v for n, v in options.items()}
