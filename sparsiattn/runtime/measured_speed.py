"""`MeasuredSpeed`: the measured speed of a site's attention, and the calls that it is valid for."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sparsiattn.kernels.base import Choice


@dataclass(frozen=True)
class MeasuredSpeed:
    """The speed of one site, for calls like the one that was timed.

    Attributes:
        ratio: Speed relative to dense attention, planning included.
        choice: The kernel, and the shape of the call.
        threads: Number of threads that torch used.
        predicts: Whether a fitted predictor ranked the keys.
    """

    ratio: float
    choice: Choice
    threads: int
    predicts: bool

    @classmethod
    def of(cls, ratio: float, choice: Choice, planner: object) -> MeasuredSpeed:
        """A measurement made in the current state of torch and the planner."""
        return cls(ratio, choice, torch.get_num_threads(), predicts(planner))

    def holds_for(self, choice: Choice, planner: object) -> bool:
        """Whether a call equals the timed one in shape, kernel, threads and ranking rule."""
        return (
            (choice.kernel.name, choice.call) == (self.choice.kernel.name, self.choice.call)
            and self.threads == torch.get_num_threads()
            and self.predicts == predicts(planner)
        )


def predicts(planner: object) -> bool:
    """Whether a planner ranks keys by a predictor's tables."""
    return bool(getattr(planner, "predicts", False))
