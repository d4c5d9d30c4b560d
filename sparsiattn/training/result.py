"""`TrainResult`: the result of `sparsiattn.train`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class TrainResult:
    """The result of `train`.

    Attributes:
        history: Rows of the log: one per update (``stage, epoch, step, lr, loss, parts``) and one
            per epoch (``epoch_loss``; with eval_data also ``top1, dense_top1, agreement``).
        best: Row of the best epoch by top-1; without eval_data, by the epoch's loss in the last
            stage. None if no epoch was completed.
        last: Row of the last epoch.
        path: The folder with ``last/``, ``best/`` and ``log.jsonl``; None if nothing was written.

    >>> row = {"stage": "train", "step": 10, "epoch_loss": 0.5, "top1": 80.0}
    >>> print(TrainResult([row], best=row, last=row, path=None))
    10 updates, last epoch: loss 0.5000, top-1 80.00
    best: loss 0.5000, top-1 80.00, after 10 updates
    """

    history: list[dict[str, Any]]
    best: dict[str, Any] | None
    last: dict[str, Any]
    path: Path | None

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {**asdict(self), "path": None if self.path is None else str(self.path)}

    def __str__(self) -> str:
        lines = [f"{self.last['step']} updates, last epoch: {_summary(self.last)}"]
        if self.best is not None:
            lines.append(f"best: {_summary(self.best)}, after {self.best['step']} updates")
        if self.path is not None:
            lines.append(f"written to {self.path}")
        return "\n".join(lines)

    # a terminal or notebook shows the last value by its repr
    __repr__ = __str__


def _summary(row: dict[str, Any]) -> str:
    accuracy = row.get("top1")
    return f"loss {row['epoch_loss']:.4f}" + ("" if accuracy is None else f", top-1 {accuracy:.2f}")
