"""What a case came to, and how many came to it."""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from sparsiattn.errors import SparsiattnError


class Wrong(AssertionError):
    """An answer that is neither right nor a documented error; says what was promised."""


@dataclass
class Tally:
    """Outcomes by name, documented errors by type, and every wrong case in words."""

    outcomes: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    about: Counter[str] = field(default_factory=Counter)
    """What the cases were about (strategies, dtypes, kernels), for the record."""
    wrong: list[str] = field(default_factory=list)

    @property
    def cases(self) -> int:
        return sum(self.outcomes.values())

    def add(self, outcome: str, *about: str) -> None:
        self.outcomes[outcome] += 1
        self.about.update(about)

    def run(self, judge: Callable[[Any], str], case: Any, *about: str) -> None:
        """Judge one case; whatever it raises is a wrong outcome."""
        try:
            outcome = judge(case)
        except Exception as error:
            outcome = "wrong"
            where = "".join(traceback.format_tb(error.__traceback__)[-2:])
            self.wrong.append(f"{case!r}\n{type(error).__name__}: {error}\n{where}")
        self.add(outcome, *about)

    def documented(self, error: BaseException) -> str:
        """The outcome for an error of the library: a leaf of `SparsiattnError` with words."""
        if not isinstance(error, SparsiattnError) or type(error) is SparsiattnError:
            raise Wrong(f"{type(error).__name__} is no documented error: {error}") from error
        if not str(error):
            raise Wrong(f"{type(error).__name__} says nothing")
        self.errors[type(error).__name__] += 1
        return f"refused: {type(error).__name__}"

    def to_dict(self) -> dict[str, Any]:
        return {
            "cases": self.cases,
            "wrong": len(self.wrong),
            "outcomes": dict(sorted(self.outcomes.items())),
            "about": dict(sorted(self.about.items())),
            "wrong_cases": self.wrong[:20],
        }
