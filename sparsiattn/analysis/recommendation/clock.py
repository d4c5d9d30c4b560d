"""The seconds that are left, and showing them from the first on."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

from sparsiattn.errors import InvalidOption
from sparsiattn.strategies.base import is_number
from sparsiattn.training.progress import Progress

EVERY = 10.0
"""Seconds from one line to the next where there is no terminal."""


@dataclass
class Clock:
    """Counts seconds from its making.

    Attributes:
        budget_s: Seconds there are.
        show: Called with the seconds gone and what is being done.
        start: The time when it was made.
        doing: What was said last.
    """

    budget_s: float
    show: Callable[[float, str], Any] = lambda gone, doing: None
    start: float = field(default_factory=lambda: perf_counter())
    doing: str = ""

    def __post_init__(self) -> None:
        budget = self.budget_s
        if not is_number(budget) or not 0 < budget < math.inf:
            raise InvalidOption(f"budget_s must be a positive number of seconds, got {budget!r}")

    @property
    def gone(self) -> float:
        """Seconds since the start."""
        return perf_counter() - self.start

    @property
    def left(self) -> float:
        """Seconds that are left, negative after the budget is spent."""
        return self.budget_s - self.gone

    def tell(self, doing: str = "") -> None:
        """Show how far it is, and what comes now if that is something else."""
        self.doing = doing or self.doing
        self.show(min(self.gone, self.budget_s), self.doing)


@contextmanager
def shown(progress: bool | Progress, budget_s: float) -> Iterator[Callable[[float, str], Any]]:
    """What shows the seconds while the block runs.

    Args:
        progress: True for a bar on a terminal's stderr and lines elsewhere, False for nothing, or a
            function that is called with the seconds gone and those there are.
        budget_s: Seconds there are.
    """
    if progress is False:
        yield lambda gone, doing: None
    elif progress is not True:
        yield lambda gone, doing: progress(round(gone), round(budget_s))
    elif sys.stderr.isatty():
        with _bar(budget_s) as show:
            yield show
    else:
        yield _Lines(budget_s)


class _Lines:
    """A line on stderr now and every `EVERY` seconds."""

    def __init__(self, budget_s: float) -> None:
        self.budget_s, self.next = budget_s, 0.0

    def __call__(self, gone: float, doing: str) -> None:
        if gone >= self.next:
            left = self.budget_s - gone
            print(f"recommend: at most {left:.0f} s left, {doing}", file=sys.stderr, flush=True)
            self.next = gone + EVERY


@contextmanager
def _bar(budget_s: float) -> Iterator[Callable[[float, str], Any]]:
    from rich.console import Console
    from rich.progress import BarColumn, ProgressColumn, Task, TextColumn
    from rich.progress import Progress as RichProgress
    from rich.text import Text

    class Left(ProgressColumn):
        """Seconds that are left, which go down also between two calls."""

        def render(self, task: Task) -> Text:
            return Text(f"at most {max(0.0, budget_s - (task.elapsed or 0.0)):.0f} s left")

    columns = (BarColumn(20), Left(), TextColumn("{task.description}"))
    with RichProgress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=budget_s)
        yield lambda gone, doing: bar.update(task, completed=gone, description=doing)
