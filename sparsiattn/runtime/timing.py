"""Fair timing: what is compared runs alternately in the same minutes, and ratios are of pairs."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Mapping
from datetime import date
from importlib import metadata
from statistics import median, quantiles
from typing import Any

import torch

from sparsiattn.kernels.tuning_cache import processor


def seconds(call: Callable[[], Any]) -> float:
    """How long a call takes, work it left running on a GPU included."""
    wait()
    start = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - start


def wait() -> None:
    """Until the GPU has done what it was given."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def alternate(
    calls: Mapping[str, Callable[[], Any]],
    rounds: int,
    on_round: Callable[[int], Any] | None = None,
) -> dict[str, list[float]]:
    """Seconds of every call in every round, after one of each to warm up. The order turns each
    round, so that no call always runs on what the same other one left in the caches. on_round:
    called with the rounds done."""
    for call in calls.values():
        call()
    names = list(calls)
    found: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        for name in names if turn % 2 == 0 else names[::-1]:
            found[name].append(seconds(calls[name]))
        if on_round is not None:
            on_round(turn + 1)
    return found


def paired(first: Callable[[], Any], second: Callable[[], Any], rounds: int) -> dict[str, Any]:
    """Runs the two alternately. Returns the median of ``second / first`` in time, its quartiles,
    and both medians in milliseconds."""
    return compared(*alternate({"first": first, "second": second}, rounds).values())


def compared(first: list[float], second: list[float]) -> dict[str, Any]:
    """The summary of paired seconds, as `paired` returns it."""
    ratios = [b / a for a, b in zip(first, second, strict=True)]
    low, middle, high = quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return {
        "ratio": round(middle, 4),
        "ratio_quartiles": [round(low, 4), round(high, 4)],
        "first_ms": round(1e3 * median(first), 3),
        "second_ms": round(1e3 * median(second), 3),
        "rounds": len(ratios),
    }


def quartiles_ms(times: list[float]) -> tuple[float, float]:
    """First and third quartile of seconds, in milliseconds."""
    low, _, high = quantiles(times, n=4) if len(times) > 1 else times * 3
    return round(1e3 * low, 3), round(1e3 * high, 3)


def fastest_ms(call: Callable[[], Any], repeats: int) -> float:
    """The fastest of some calls after one to warm up, in milliseconds."""
    call()
    return min(1e3 * seconds(call) for _ in range(repeats))


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
