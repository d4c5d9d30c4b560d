"""What a search found."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from sparsiattn.analysis.schedule_search.evaluation import Trial
from sparsiattn.patching.text import macs_text


@dataclass(frozen=True)
class SearchResult:
    """A schedule that meets a budget.

    schedule: ``{"k": {site: share}, "keep": {block: share}}``, for `patch` with ``strategy``
    (JSON form). found: how it did on the images; uniform: the best schedule of equal shares within
    the same budget, for comparison, with its shares (uniform_shares) and schedule
    (uniform_schedule), None where none meets it.
    macs_dense: of the dense model, per image. trials: how many schedules ran.
    """

    strategy: Mapping[str, Any]
    budget: Mapping[str, float]
    schedule: dict[str, dict[str, float]]
    found: Trial
    uniform: Trial | None
    uniform_shares: dict[str, float] | None
    uniform_schedule: dict[str, dict[str, float]] | None
    macs_dense: int
    images: int
    trials: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def save(self, path: str | PathLike[str]) -> Path:
        """Write the schedule as JSON, with what is known of it under ``about``; `patch` takes the
        file as ``schedule=``."""
        about = {name: value for name, value in self.to_dict().items() if name != "schedule"}
        for name in ("found", "uniform"):
            if about[name] is not None:
                about[name].pop("choice")
        path = Path(path)
        text = json.dumps({**self.schedule, "about": about}, indent=2)
        path.write_text(text + "\n", encoding="utf-8")
        return path

    def __str__(self) -> str:
        lines = [f"{self.strategy['name']}, {_said(self.budget)}: {self._row(self.found)}"]
        if self.uniform is not None and self.uniform_shares is not None:
            shares = ", ".join(f"{name}={value}" for name, value in self.uniform_shares.items())
            lines.append(f"best uniform ({shares}): {self._row(self.uniform)}")
        lines.append(f"{self.trials} schedules tried on {self.images} images")
        for kind, budgets in self.schedule.items():
            text = ", ".join(f"{name} {share:g}" for name, share in budgets.items() if share < 1)
            lines.append(f"{kind}: {text or 'all'}")
        return "\n".join(lines)

    def _row(self, trial: Trial) -> str:
        left = 100 * trial.macs / max(1, self.macs_dense)
        time = "" if trial.latency is None else f", {trial.latency:.2f} of dense time"
        return (
            f"{macs_text(trial.macs)} MACs ({left:.1f} % of dense){time}, agreement "
            f"{100 * trial.agreement:.2f} %, divergence {trial.divergence:.4g}"
        )


def _said(budget: Mapping[str, float]) -> str:
    return ", ".join(f"{name}={value:g}" for name, value in budget.items())
