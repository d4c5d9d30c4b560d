"""The budget of a search: a limit for candidates, and the order of those that meet it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from sparsiattn.analysis.schedule_search.evaluation import Trial
from sparsiattn.errors import InvalidOption

BUDGETS = ("macs", "latency", "agreement")


@dataclass(frozen=True)
class Budget:
    """A limit for candidates, and the order of those that meet it.

    Attributes:
        kind: One of `BUDGETS`.
        limit: Upper limit of MACs per image or of time relative to the dense model, or lower limit
            of agreement.
        measure: Name of the agreement measure in texts.
    """

    kind: str
    limit: float
    measure: str = "agreement"

    @classmethod
    def read(cls, budget: Any) -> Budget:
        """Check a user's budget; a share of MACs is not converted.

        Raises:
            InvalidOption: It is not a budget.
        """
        choices = f"one of {', '.join(f'{{{name!r}: ...}}' for name in BUDGETS)}"
        if not isinstance(budget, Mapping) or len(budget) != 1 or next(iter(budget)) not in BUDGETS:
            raise InvalidOption(f"budget must be {choices}, got {budget!r}")
        kind, bound = next(iter(budget.items()))
        number = isinstance(bound, (int, float)) and not isinstance(bound, bool)
        most = float("inf") if kind == "macs" and isinstance(bound, int) else 1.0
        if not number or not 0 < bound <= most:
            raise InvalidOption(f"the budget of {kind} must be in (0, 1], got {bound!r}")
        return cls(kind, bound)

    def met_by(self, trial: Trial) -> bool:
        """Whether a trial meets the budget; False if its time was not measured."""
        if self.kind == "agreement":
            return trial.agreement >= self.limit
        cost = trial.macs if self.kind == "macs" else trial.latency
        return cost is not None and cost <= self.limit

    def order(self, trial: Trial) -> tuple[float, float]:
        """Sort key of a trial; smaller is better."""
        if self.kind == "agreement":
            return trial.macs, trial.divergence
        return trial.divergence, trial.macs

    def best(self, trials: Iterable[Trial]) -> Trial | None:
        """The best trial that meets the budget; None if there is none."""
        return min(filter(self.met_by, trials), key=self.order, default=None)

    def __str__(self) -> str:
        if self.kind == "macs":
            return f"MACs <= {self.limit:.4g}"
        if self.kind == "agreement":
            return f"{self.measure} >= {self.limit}"
        return f"time <= {self.limit} of the dense model's"
