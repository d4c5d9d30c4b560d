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

    Attributes:
        strategy: The strategy searched, in JSON form.
        budget: The one that was asked for.
        schedule: ``{"k": {site: share}, "keep": {block: share}}``, for `patch` with ``strategy``.
        found: How the schedule did on the images.
        uniform: The best schedule of equal shares within the same budget, for comparison; None
            where none meets it.
        uniform_shares: Its shares.
        uniform_schedule: Its schedule.
        macs_dense: MACs of the dense model, per image.
        images: Images searched on.
        trials: Schedules run.
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
        """Plain values for JSON."""
        return asdict(self)

    def save(self, path: str | PathLike[str]) -> Path:
        """Write the schedule as JSON, with what is known of it under ``about``.

        Args:
            path: A file that `patch` takes as ``schedule=``.

        Returns:
            The path written.
        """
        about = self.to_dict()
        schedule = about.pop("schedule")
        for name in ("found", "uniform"):
            if about[name] is not None:
                about[name].pop("choice")
        path = Path(path)
        text = json.dumps({**schedule, "about": about}, indent=2)
        path.write_text(text + "\n", encoding="utf-8")
        return path

    def __str__(self) -> str:
        budget = ", ".join(f"{name}={value:g}" for name, value in self.budget.items())
        lines = [f"{self.strategy['name']}, {budget}: {self._text(self.found)}"]
        if self.uniform is not None and self.uniform_shares is not None:
            shares = ", ".join(f"{name}={value}" for name, value in self.uniform_shares.items())
            lines.append(f"best uniform ({shares}): {self._text(self.uniform)}")
        lines.append(f"{self.trials} schedules tried on {self.images} images")
        for kind, budgets in self.schedule.items():
            text = ", ".join(f"{name} {share:g}" for name, share in budgets.items() if share < 1)
            lines.append(f"{kind}: {text or 'all'}")
        return "\n".join(lines)

    def _text(self, trial: Trial) -> str:
        left = 100 * trial.macs / max(1, self.macs_dense)
        time = "" if trial.latency is None else f", {trial.latency:.2f} of dense time"
        return (
            f"{macs_text(trial.macs)} MACs ({left:.1f} % of dense){time}, agreement "
            f"{100 * trial.agreement:.2f} %, divergence {trial.divergence:.4g}"
        )
