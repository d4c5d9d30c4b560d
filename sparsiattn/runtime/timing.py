"""Fair timing: what is compared runs alternately in the same minutes, and ratios are of pairs."""

from __future__ import annotations

import math
import os
import platform
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import date
from importlib import metadata
from statistics import quantiles
from typing import Any, NamedTuple, TypeVar

import torch

from sparsiattn.errors import InvalidOption
from sparsiattn.kernels.tuning_cache import processor

T = TypeVar("T")


class Quartiles(NamedTuple):
    """Median and quartiles of one figure over all rounds.

    Attributes:
        low: First quartile.
        median: Second quartile.
        high: Third quartile.
    """

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Quartiles:
        """Summarise values; a single one is its own quartile.

        >>> Quartiles.of([3.0, 1.0, 2.0])
        Quartiles(low=1.0, median=2.0, high=3.0)
        """
        values = list(values)
        return cls(*(quantiles(values, n=4) if len(values) > 1 else values * 3))

    def rounded(self, digits: int, scale: float = 1.0) -> tuple[float, tuple[float, float]]:
        """Median, and first and third quartile."""
        low, median, high = (round(scale * value, digits) for value in self)
        return median, (low, high)

    def ms(self) -> tuple[float, tuple[float, float]]:
        """Seconds in milliseconds, rounded to microseconds."""
        return self.rounded(3, 1e3)


@dataclass(frozen=True)
class Timing:
    """Two calls timed in alternation.

    Attributes:
        rounds: Paired runs.
        first: Seconds of the first call.
        second: Seconds of the second call.
        ratio: ``second / first`` in time, pair by pair: how much faster the first call is.
    """

    rounds: int
    first: Quartiles
    second: Quartiles
    ratio: Quartiles

    @classmethod
    def of(cls, first: list[float], second: list[float]) -> Timing:
        """Summarise seconds that were measured in pairs.

        >>> Timing.of([1.0, 10.0, 2.0], [2.0, 30.0, 2.0]).ratio.median
        2.0
        """
        ratios = [b / a for a, b in zip(first, second, strict=True)]
        return cls(len(ratios), *map(Quartiles.of, (first, second, ratios)))

    def to_dict(self) -> dict[str, Any]:
        """Rounded figures for JSON."""
        ratio, quartiles = self.ratio.rounded(4)
        return {
            "ratio": ratio,
            "ratio_quartiles": list(quartiles),
            "first_ms": self.first.ms()[0],
            "second_ms": self.second.ms()[0],
            "rounds": self.rounds,
        }


def timed(call: Callable[[], T]) -> tuple[T, float]:
    """What a call returns, and its seconds; work that it left running on a GPU counts."""
    wait()
    start = time.perf_counter()
    result = call()
    wait()
    return result, time.perf_counter() - start


def seconds(call: Callable[[], Any]) -> float:
    """How long a call takes, see `timed`."""
    return timed(call)[1]


def wait() -> None:
    """Wait until the accelerator has done what it was given; nothing to do before its first use."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def alternate(
    calls: Mapping[str, Callable[[], Any]],
    rounds: int,
    on_round: Callable[[int], Any] | None = None,
) -> dict[str, list[float]]:
    """Time several calls in turn, after one run of each to warm up.

    Args:
        calls: What to time, by name.
        rounds: How often.
        on_round: Called with the number of rounds done.

    Returns:
        Seconds of every call in every round.

    Raises:
        InvalidOption: ``rounds`` is not a positive int.
    """
    if type(rounds) is not int or rounds < 1:
        raise InvalidOption(f"rounds must be an int >= 1, got {rounds!r}")
    for call in calls.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds):
        # the order turns, so that no call always runs on what the same other one left in the caches
        for name in list(calls)[:: -1 if turn % 2 else 1]:
            times[name].append(seconds(calls[name]))
        if on_round is not None:
            on_round(turn + 1)
    return times


@dataclass(frozen=True)
class Sampled:
    """What became of calls that were timed within limits.

    Attributes:
        times: Seconds of every round in which a call took part; of a slow one, those of the run
            that should have warmed it up.
        failed: What the others raised.
    """

    times: dict[str, list[float]]
    failed: dict[str, Exception]


def alternate_within(
    calls: Mapping[str, Callable[[], Any]], rounds: int, limit: float = math.inf
) -> Sampled:
    """As `alternate`, but calls that are slow run less often, and one that raises runs no more.

    Args:
        calls: What to time, by name; the first is what the others are compared with, and takes
            part in every round.
        rounds: How often at most.
        limit: Seconds for all of it; after an equal share of them a call rests. Each runs once
            whatever that takes.
    """
    times: dict[str, list[float]] = {}
    failed: dict[str, Exception] = {}
    first = next(iter(calls))
    spent = dict.fromkeys(calls, 0.0)
    for turn in range(rounds + 1):
        share = limit / max(1, len(calls) - len(failed))
        active = [n for n in calls if n not in failed and (n == first or spent[n] < share)]
        if first in failed or (turn > 1 and active == [first]):
            break
        for name in active[:: -1 if turn % 2 else 1]:
            try:
                took = seconds(calls[name])
            except Exception as error:
                failed[name] = error
                times.pop(name, None)
                continue
            spent[name] += took
            # the first run is kept only where no other follows
            times[name] = [took] if turn < 2 else [*times[name], took]
    return Sampled(times, failed)


def paired(first: Callable[[], Any], second: Callable[[], Any], rounds: int) -> Timing:
    """Time two calls alternately."""
    return Timing.of(*alternate({"first": first, "second": second}, rounds).values())


def machine() -> dict[str, Any]:
    """Versions and hardware, without names of machines or paths."""
    card: dict[str, Any] = {
        "date": date.today().isoformat(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    for name in ("timm", "sparsiattn"):
        try:
            card[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            card[name] = "not installed"
    if torch.cuda.is_available():
        card["gpu"] = torch.cuda.get_device_name()
    return card
