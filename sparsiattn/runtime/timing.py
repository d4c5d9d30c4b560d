"""Fair timing: the calls to compare run alternately, and ratios are taken pair by pair."""

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
        Quartiles(low=1.5, median=2.0, high=2.5)
        """
        values = list(values)
        if len(values) == 1:
            return cls(*(values * 3))
        # inclusive: a quartile of two or three values lies between them
        return cls(*quantiles(values, n=4, method="inclusive"))

    def rounded(self, digits: int, scale: float = 1.0) -> tuple[float, tuple[float, float]]:
        """Median, and a pair of first and third quartile, scaled and rounded."""
        low, median, high = (round(scale * value, digits) for value in self)
        return median, (low, high)

    def ms(self) -> tuple[float, tuple[float, float]]:
        """Convert seconds to milliseconds, rounded to microseconds; as `rounded`."""
        return self.rounded(3, 1e3)


@dataclass(frozen=True)
class Timing:
    """Two calls timed in alternation.

    Attributes:
        rounds: Number of paired runs.
        first: Time of the first call, in seconds.
        second: Time of the second call, in seconds.
        ratio: Time of the second call divided by that of the first, pair by pair: the speed-up of
            the first call.
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
    """The result of a call, and its time in seconds, including work it queued on a GPU."""
    wait()
    start = time.perf_counter()
    result = call()
    wait()
    return result, time.perf_counter() - start


def seconds(call: Callable[[], Any]) -> float:
    """The time of a call in seconds, see `timed`."""
    return timed(call)[1]


def wait() -> None:
    """Wait until the accelerator has finished its queued work; returns at once without one."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def alternate(
    calls: Mapping[str, Callable[[], Any]],
    rounds: int,
    on_round: Callable[[int], Any] | None = None,
) -> dict[str, list[float]]:
    """Time several calls in turn, after one run of each to warm up.

    Args:
        calls: The calls to time, by name.
        rounds: Number of rounds; every call runs once per round.
        on_round: Called after each round with the number of rounds done.

    Returns:
        By name, the time of the call in every round, in seconds.

    Raises:
        InvalidOption: ``rounds`` is not a positive int.
    """
    if type(rounds) is not int or rounds < 1:
        raise InvalidOption(f"rounds must be an int >= 1, got {rounds!r}")
    for call in calls.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds):
        # alternate the order, so that no call always finds the caches as the same other call
        # left them
        for name in list(calls)[:: -1 if turn % 2 else 1]:
            times[name].append(seconds(calls[name]))
        if on_round is not None:
            on_round(turn + 1)
    return times


@dataclass(frozen=True)
class Sampled:
    """Times of calls that were timed within a time limit.

    Attributes:
        times: By name, the time in every round that a call took part in, in seconds; for a call too
            slow for a second run, the time of its warm-up run.
        failed: By name, the exception of calls that raised.
    """

    times: dict[str, list[float]]
    failed: dict[str, Exception]


def alternate_within(
    calls: Mapping[str, Callable[[], Any]], rounds: int, limit: float = math.inf
) -> Sampled:
    """As `alternate`, but slow calls run less often, and a call that raises is not run again.

    Args:
        calls: The calls to time, by name. The first is the reference and runs in every round.
        rounds: Largest number of rounds.
        limit: Time limit in seconds for all calls together. Each call gets an equal share of it,
            and runs at least once, however long that takes.

    Returns:
        The times and the failures.
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
            # the warm-up run is kept only if no other run follows
            times[name] = [took] if turn < 2 else [*times[name], took]
    return Sampled(times, failed)


def paired(first: Callable[[], Any], second: Callable[[], Any], rounds: int) -> Timing:
    """Time two calls alternately."""
    return Timing.of(*alternate({"first": first, "second": second}, rounds).values())


def machine() -> dict[str, Any]:
    """Versions and hardware, without host names or paths."""
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
