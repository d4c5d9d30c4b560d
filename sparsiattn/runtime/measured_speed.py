"""`MeasuredSpeed`: what a site's attention took on the clock, and for which calls that holds."""

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
        threads: In how many threads torch computed.
        predicts: Whether a fitted predictor ranked the keys.
    """

    ratio: float
    choice: Choice
    threads: int
    predicts: bool

    @classmethod
    def of(cls, ratio: float, choice: Choice, planner: object) -> MeasuredSpeed:
        """A measurement that was made just now."""
        return cls(ratio, choice, torch.get_num_threads(), predicts(planner))

    def holds_for(self, choice: Choice, planner: object) -> bool:
        """Whether a call is still like the one that was timed: shape, kernel, threads and rule."""
        return (
            (choice.kernel.name, choice.call) == (self.choice.kernel.name, self.choice.call)
            and self.threads == torch.get_num_threads()
            and self.predicts == predicts(planner)
        )


def predicts(planner: object) -> bool:
    """Whether a planner ranks keys by tables that were fitted, or that it was told to use."""
    return bool(getattr(planner, "predicts", False))
