"""What every benchmark shares: paired runs, the machine's card, JSON on disk."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import timm
import torch

RESULTS = Path(__file__).parent / "results"


def paired(first: Callable[[], Any], second: Callable[[], Any], rounds: int) -> dict[str, float]:
    """Runs the two alternately, after one pair of warm-up, the order turning each round. Returns
    the median of ``second / first`` in time, its quartiles, and both medians in milliseconds."""
    first(), second()
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(rounds):
        for which in (0, 1) if turn % 2 else (1, 0):
            times[which].append(_seconds((first, second)[which]))
    ratios = [b / a for a, b in zip(*times, strict=True)]
    low, _, high = quantiles(ratios, n=4)
    return {
        "ratio": round(median(ratios), 4),
        "ratio_quartiles": [round(low, 4), round(high, 4)],  # type: ignore[dict-item]
        "first_ms": round(1e3 * median(times[0]), 3),
        "second_ms": round(1e3 * median(times[1]), 3),
        "rounds": rounds,
    }


def _seconds(call: Callable[[], Any]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def fastest_ms(call: Callable[[], Any], repeats: int) -> float:
    """The fastest of some calls after one to warm up, in milliseconds."""
    call()
    return min(1e3 * _seconds(call) for _ in range(repeats))


def machine() -> dict[str, Any]:
    """Versions and hardware, without names of machines or paths."""
    card: dict[str, Any] = {
        "date": date.today().isoformat(),
        "command": " ".join(["python", *(Path(a).name if "/" in a else a for a in sys.argv)]),
        "commit": _commit(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "python": platform.python_version(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    if torch.cuda.is_available():
        card["gpu"] = torch.cuda.get_device_name()
    return card


def _commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def write(name: str, content: dict[str, Any]) -> Path:
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": machine(), **content}, indent=2) + "\n")
    print(f"wrote {path.name}")
    return path
