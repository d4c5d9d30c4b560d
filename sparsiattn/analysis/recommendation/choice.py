"""Which of the settings that were measured is recommended: one rule, read off the table alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from sparsiattn.errors import InvalidOption
from sparsiattn.strategies.base import is_number


class Figures(Protocol):
    """What a row of the table says of a setting."""

    @property
    def ratio(self) -> float | None: ...
    @property
    def quality(self) -> float | None: ...


F = TypeVar("F", bound=Figures)


@dataclass(frozen=True)
class Goal:
    """What the user wants: at least one of the two.

    Attributes:
        speedup: The least time of the dense model over that of the patched one.
        quality: The least share of answers kept, or mean cosine of features.
    """

    speedup: float | None = None
    quality: float | None = None

    def __post_init__(self) -> None:
        if self.speedup is None and self.quality is None:
            raise InvalidOption(
                "recommend needs a goal: speedup=1.5 (dense time over patched time), "
                "quality=0.99 (share of answers kept, or cosine of features), or both"
            )
        if self.speedup is not None and not (is_number(self.speedup) and self.speedup > 1):
            raise InvalidOption(f"speedup must be a number > 1, got {self.speedup!r}")
        if self.quality is not None and not (is_number(self.quality) and self.quality <= 1):
            raise InvalidOption(f"quality must be a number <= 1, got {self.quality!r}")

    def is_fast(self, row: Figures) -> bool:
        """Whether a row was measured and is fast enough: faster than dense, if no more is asked."""
        if row.ratio is None:
            return False
        return row.ratio > 1.0 if self.speedup is None else row.ratio >= self.speedup

    def is_good(self, row: Figures) -> bool:
        """Whether a row was measured and is good enough; any is where no quality is asked for."""
        if row.quality is None:
            return False
        return self.quality is None or row.quality >= self.quality

    def met_by(self, row: Figures) -> bool:
        """Whether a row meets all that is asked for."""
        return self.is_fast(row) and self.is_good(row)

    def pick(self, rows: Sequence[F]) -> F | None:
        """The row that is recommended, None where none is measured.

        With ``speedup``: the best quality of those fast enough, else the fastest of those good
        enough, else the fastest. With ``quality`` alone: the fastest of those good enough, else
        the best quality. Of equals the faster, or the better.
        """
        measured = [row for row in rows if row.ratio is not None and row.quality is not None]
        fast, good = filter(self.is_fast, measured), filter(self.is_good, measured)
        if self.speedup is None:
            return max(good, key=_by_speed, default=max(measured, key=_by_quality, default=None))
        slow = list(good) or measured
        return max(fast, key=_by_quality, default=max(slow, key=_by_speed, default=None))

    def __str__(self) -> str:
        parts = [] if self.speedup is None else [f"speedup >= {self.speedup:g}"]
        parts += [] if self.quality is None else [f"quality >= {self.quality:g}"]
        return " and ".join(parts)


def _by_speed(row: Figures) -> tuple[float, float]:
    return row.ratio or 0.0, row.quality or 0.0


def _by_quality(row: Figures) -> tuple[float, float]:
    return row.quality or 0.0, row.ratio or 0.0
