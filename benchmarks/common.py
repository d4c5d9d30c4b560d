"""What every benchmark shares: paired runs, the machine's card, JSON on disk."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sparsiattn.runtime import timing

__all__ = ["RESULTS", "fastest_ms", "machine", "made", "paired", "places", "roof", "write"]

RESULTS = Path(os.environ.get("BENCHMARK_RESULTS", Path(__file__).parent / "results"))
"""Where benchmarks write; set the variable for a trial run, which must not replace what counts."""


CARD = ("date", "commit", "processor", "threads", "torch", "timm")


def machine() -> dict[str, Any]:
    """Versions and hardware, and what made the figures."""
    command = " ".join(["python", *(Path(a).name if "/" in a else a for a in sys.argv)])
    return {**timing.machine(), "command": command, "commit": _commit()}


def made() -> dict[str, Any]:
    """When and where a row was made, for files whose rows come from many runs."""
    card = machine()
    return {key: card[key] for key in CARD}


def places(cards: list[dict[str, Any]]) -> str:
    """Processors and days of the runs that made some rows."""
    found = sorted({(card["processor"], card["date"]) for card in cards})
    return "; ".join(f"{processor}, {date}" for processor, date in found)


def paired(first: Callable[[], Any], second: Callable[[], Any], rounds: int) -> dict[str, Any]:
    """Two calls timed in turn, as JSON."""
    return timing.paired(first, second, rounds).to_dict()


def fastest_ms(call: Callable[[], Any], repeats: int) -> float:
    """The fastest of some calls after one to warm up, in milliseconds."""
    call()
    return min(1e3 * timing.seconds(call) for _ in range(repeats))


def roof(device: str, dtype: torch.dtype) -> dict[str, float]:
    """What the machine can do at best here: GFLOP/s of a large matrix product, GB/s of a copy
    (bytes read and written)."""
    a = torch.randn(4096 if device == "cuda" else 1536, 4096, device=device, dtype=dtype)
    b = torch.randn(4096, len(a), device=device, dtype=dtype)
    flops = 2 * len(a) ** 2 * 4096
    whole = torch.empty(1 << 26, device=device, dtype=dtype)
    other = torch.empty_like(whole)
    moved = 2 * whole.numel() * dtype.itemsize
    return {
        "gflops": round(1e-6 * flops / fastest_ms(lambda: a @ b, 10), 1),
        "gbytes": round(1e-6 * moved / fastest_ms(lambda: other.copy_(whole), 10), 1),
    }


def _commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def write(name: str, content: dict[str, Any]) -> Path:
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": machine(), **content}, indent=2) + "\n")
    print(f"wrote {path.name}")
    return path
