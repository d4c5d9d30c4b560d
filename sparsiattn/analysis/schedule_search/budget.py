"""What a candidate must keep to, and which of those that do is the best."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from sparsiattn.analysis.schedule_search.evaluation import Trial
from sparsiattn.errors import InvalidOption

BUDGETS = ("macs", "latency", "agreement")


@dataclass(frozen=True)
class Budget:
    """A limit, and an order of those that keep to it.

    Attributes:
        kind: One of `BUDGETS`.
        limit: MACs per image or time over the dense model's at most, or agreement at least.
        measure: What agreement is, in words.
    """

    kind: str
    limit: float
    measure: str = "agreement"

    @classmethod
    def read(cls, budget: Any) -> Budget:
        """Check what a user gave; a share of MACs stays one.

        Raises:
            InvalidOption: It is no budget.
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

    def best(self, trials: Iterable[Trial]) -> Trial | None:
        """The best of those that keep to it; None where none does."""
        return min(filter(self.met_by, trials), key=self.order, default=None)

    def __str__(self) -> str:
        if self.kind == "macs":
            return f"MACs <= {self.limit:.4g}"
        if self.kind == "agreement":
            return f"{self.measure} >= {self.limit}"
        return f"time <= {self.limit} of the dense model's"
