"""Reliability figures: ``python benchmarks/reliability``, half an hour on a core of its own.

Drawn cases (hypothesis, one seed), threads, cycles of patching, injected exceptions, determinism,
half precision, kills. Parts that were run before (``--work``) are not run again; ``--only`` takes
a glob over their names, so that several processes can share the work (`OMP_NUM_THREADS=1` each).
Exits with 1 where anything was wrong.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent)]

import torch  # noqa: E402
from common import write  # noqa: E402

from reliability import (  # noqa: E402
    cycles,
    determinism,
    fuzz,
    halves,
    injected,
    kills,
    threads,
)
from reliability.lanes import KINDS  # noqa: E402

OTHERS = tuple(i for i, kind in enumerate(KINDS) if kind[1] is not None and i not in (1, 7))
PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    **{
        f"fuzz models {part}": lambda part=part: fuzz.models(100, part).to_dict()  # type: ignore[misc]
        for part in range(6)
    },
    "fuzz kernels": lambda: fuzz.kernels(6_500).to_dict(),
    "fuzz kernels again": lambda: fuzz.kernels(1_800, 1).to_dict(),
    "fuzz kernels once more": lambda: fuzz.kernels(1_400, 2).to_dict(),
    "fuzz options": lambda: fuzz.misuse(300).to_dict(),
    "fuzz saved": lambda: fuzz.saved(80).to_dict(),
    "threads": lambda: threads.run(rounds=25),
    "cycles": lambda: cycles.run(1_000),
    "injected": lambda: injected.run((1, 7)),
    "injected elsewhere": lambda: injected.run(OTHERS, every=4),
    "determinism": lambda: determinism.run(processes=2),
    "halves": halves.run,
    "kills": lambda: kills.run(training=8, saving=24),
}


def run(part: str) -> dict[str, Any]:
    """One part, with the seconds that it took."""
    began = time.perf_counter()
    found = PARTS[part]()
    return {**found, "seconds": round(time.perf_counter() - began)}


def summary(parts: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What the parts come to together."""
    fuzzed = [row for name, row in parts.items() if name.startswith("fuzz")]
    return {
        "seed": fuzz.SEED,
        "fuzz_cases": sum(row["cases"] for row in fuzzed),
        "fuzz_wrong": sum(row["wrong"] for row in fuzzed),
        "wrong": sum(wrong_in(row) for row in parts.values()),
        "not_run": [name for name in PARTS if name not in parts],
        "parts": parts,
    }


def wrong_in(row: dict[str, Any]) -> int:
    """How much of one part's result is not as promised."""
    found = (
        int(row.get("wrong", 0)) + int(row.get("hooks_left", 0)) + int(row.get("still_alive", 0))
    )
    found += sum(len(row.get(name, ())) for name in ("changed_models", "differ_within_one"))
    found += len(row.get("differ_between_processes", ()))
    return found + sum(int(row[name]["wrong"]) for name in ("training", "saving") if name in row)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("reliability-work"), help="of the parts")
    parser.add_argument("--only", default="*", help="glob over the parts")
    parser.add_argument("--partial", action="store_true", help="write also if parts are missing")
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.work.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as cache:
        os.environ["SPARSIATTN_CACHE"] = cache  # what was tuned here decides nothing
        _compile_native()
        for name in PARTS:
            place = given.work / f"{name}.json"
            if fnmatch.fnmatch(name, given.only) and not place.exists():
                place.write_text(json.dumps(run(name)))
                print(name, "done", flush=True)
    places = {name: given.work / f"{name}.json" for name in PARTS}
    there = {name: place for name, place in places.items() if place.exists()}
    if len(there) < len(PARTS) and not given.partial:
        return 0
    found = summary({name: json.loads(place.read_text()) for name, place in there.items()})
    write("reliability-cpu", found)
    return 1 if found["wrong"] else 0


def _compile_native() -> None:
    """Where there is a compiler, the kernel in C takes part."""
    from sparsiattn.kernels import compile_native

    print("native kernel:", compile_native() or "compiled", flush=True)


if __name__ == "__main__":
    sys.exit(main())
