"""The plan of a search: number of trials, expected time, and progress messages."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from sparsiattn.analysis.schedule_search.evaluation import TrialRunner
from sparsiattn.analysis.schedule_search.space import Candidate, Space
from sparsiattn.training import bar

PROPOSALS = 60
"""Number of proposed candidates if the number of trials is not set."""

FINALISTS = 6
"""Largest number of candidates that are timed together at the end, besides the leading ones."""


@dataclass(frozen=True)
class Plan:
    """The candidates to run.

    Attributes:
        uniforms: Candidates with equal shares.
        singles: Candidates with a single change.
        proposals: Largest number of other candidates.
        rounds: Number of paired runs of each final timing; 0 if nothing is timed.
    """

    uniforms: list[Candidate]
    singles: list[Candidate]
    proposals: int
    rounds: int = 0

    @classmethod
    def of(cls, space: Space, trials: int | None, rounds: int = 0) -> Plan:
        """Divide a number of trials into uniform candidates, single changes and proposals.

        If it is too small for all uniform candidates and single changes, a third of it is uniform,
        and half of the rest are single changes.

        Args:
            space: The search space.
            trials: Total number; None for all uniform candidates, all single changes, and
                `PROPOSALS`.
            rounds: Number of paired runs of each final timing.
        """
        uniforms = list(space.uniforms())
        singles = [single for single in space.singles() if single not in uniforms]
        if trials is None:
            return cls(uniforms, singles, PROPOSALS, rounds)
        if trials < len(uniforms) + len(singles):
            first = [candidate for candidate in uniforms if candidate.setting == 0]
            uniforms = [c for c in uniforms if c.setting > 0]
            count = -(-trials // 3)
            uniforms = _spread(first, count) + _spread(uniforms, count - len(first))
            singles = [s for s in space.singles() if s not in uniforms]
            singles = singles[: (trials - len(uniforms)) // 2]
        return cls(uniforms, singles, trials - len(uniforms) - len(singles), rounds)

    @property
    def trials(self) -> int:
        """Largest number of candidates that are run on the images."""
        return len(self.uniforms) + len(self.singles) + self.proposals

    @property
    def quick_rounds(self) -> int:
        """Number of paired runs of the timings that select finalists."""
        return max(1, self.rounds // 3)

    @property
    def race_runs(self) -> int:
        """Approximate number of forward passes of the final timings."""
        return (FINALISTS + 1 + 3) * (self.rounds + 1) if self.rounds else 0

    def seconds(self, runner: TrialRunner, patch_seconds: float) -> float:
        """Expected time of the whole search, in seconds.

        Args:
            runner: The runner, with the times of the dense model.
            patch_seconds: Time to patch the model and to count MACs, in seconds.
        """
        total = self.trials * (runner.dense_seconds + patch_seconds)
        if self.rounds:
            quick = (len(self.uniforms) + self.proposals) * 2 * (self.quick_rounds + 1)
            total += (quick + self.race_runs) * runner.batch_seconds
            total += (len(self.uniforms) + self.proposals) * patch_seconds
        return total

    def text(self, runner: TrialRunner, patch_seconds: float) -> str:
        """The plan as a message."""
        images = sum(map(len, runner.images))
        parts = f"{len(self.uniforms)} uniform, {len(self.singles)} single changes"
        timings = ", and timings on the first batch" if self.rounds else ""
        return (
            f"search: up to {self.trials} trials ({parts}, {self.proposals} proposed) x "
            f"{images} images = {self.trials * images:,} forward passes{timings}; about "
            f"{duration(self.seconds(runner, patch_seconds))}, as the dense model took "
            f"{runner.dense_seconds:.3g} s for all images, and patching {patch_seconds:.2g} s"
        )


def _spread(candidates: list[Candidate], count: int) -> list[Candidate]:
    """``count`` evenly spaced elements of a list, including the last one, which keeps the least."""
    count = max(0, min(count, len(candidates)))
    return [candidates[(i + 1) * len(candidates) // count - 1] for i in range(count)]


def duration(seconds: float) -> str:
    """A duration in a readable unit.

    >>> duration(7.4), duration(300), duration(7000)
    ('7 s', '5 min', '1.9 h')
    """
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


class Shown(Protocol):
    """Called with the number of candidates run, or with None to refresh the progress."""

    def __call__(self, done: int | None = None, /) -> None: ...


@contextmanager
def shown(text: str, total: int, show: bool) -> Iterator[Shown]:
    """Show a text on stderr, then a progress bar on a terminal, or else one line per minute.

    Args:
        text: The text.
        total: Largest number of candidates to run.
        show: Whether to show anything.
    """
    if show:
        print(text, file=sys.stderr, flush=True)
    if not show or not sys.stderr.isatty():
        yield MinuteLines(total, show)
        return
    with bar("searching", total) as advance:
        yield lambda done=None: None if done is None else advance(done)


class MinuteLines:
    """Writes the progress of the search to stderr, at most once per minute.

    Args:
        total: Largest number of candidates to run.
        show: Whether to write.
    """

    def __init__(self, total: int, show: bool) -> None:
        self.total, self.show, self.done = total, show, 0
        self.start = self.last = time.monotonic()

    def __call__(self, done: int | None = None, /) -> None:
        self.done = self.done if done is None else done
        now = time.monotonic()
        if self.show and now - self.last >= 60:
            self.last = now
            print(
                f"search: {self.done} of up to {self.total} trials after "
                f"{duration(now - self.start)}",
                file=sys.stderr,
                flush=True,
            )
