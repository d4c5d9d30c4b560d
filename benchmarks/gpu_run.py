"""Everything that needs a GPU: a smoke test, the tests marked ``gpu``, then the benchmarks.

    python benchmarks/gpu_run.py --list                   # stages, their parts and budgets
    python benchmarks/gpu_run.py [STAGE ...] --out DIR    # all stages, or those named
    python benchmarks/gpu_run.py part1                    # the stages of one part

Each stage is a process with a time budget of its own, and one that fails or takes too long does not
stop the others. As each one ends, a line is appended to ``DIR/stages.jsonl``, its output is in
``DIR/STAGE.log``, and the JSON files it wrote are copied to ``DIR``. Each part takes less than nine
minutes. ``--resume`` leaves out stages that ended well before. Exits 1 if any stage failed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


@dataclass(frozen=True)
class Stage:
    """One process.

    Attributes:
        part: The part of the run that it belongs to.
        seconds: Its time budget.
        command: Arguments of Python.
    """

    part: int
    seconds: int
    command: tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    """How one stage ended; ``result`` is ``"ok"``, ``"failed"`` or ``"too slow"``."""

    stage: str
    result: str
    status: int | None
    seconds: float
    command: str


def _tests() -> tuple[str, ...]:
    """The tests, in processes side by side where pytest-xdist is installed."""
    command = "-m pytest tests/kernels/test_gpu.py -m gpu -q -p no:benchmark -p no:cacheprovider"
    if importlib.util.find_spec("xdist") is not None:
        command += f" -n {max(1, min(12, (os.cpu_count() or 1) - 2))}"
    return tuple(command.split())


def _benchmark(name: str, *options: str) -> tuple[str, ...]:
    return f"benchmarks/{name}.py", "--device", "cuda", "--dtype", "bfloat16", *options


STAGES = {
    "smoke": Stage(1, 120, ("benchmarks/gpu_smoke.py",)),
    "tests": Stage(1, 400, _tests()),
    "triton": Stage(
        2, 100, _benchmark("kernels", "--batch", "8", "--rounds", "30", "--kernel", "triton")
    ),
    "gather": Stage(2, 60, _benchmark("kernels", "--batch", "8", "--rounds", "30")),
    "flex": Stage(
        2, 220, _benchmark("kernels", "--batch", "8", "--rounds", "15", "--kernel", "flex")
    ),
    "sweep": Stage(
        2, 90, _benchmark("kernels", "--sweep", "--rounds", "9", "--kernel", "triton")
    ),
    "memory": Stage(2, 60, _benchmark("memory")),
    "resolution": Stage(
        3, 270,
        _benchmark(
            "resolution", "--compile", "--model", "vit_base_patch16_224", "--batch", "8"
        ),
    ),
    "tokens": Stage(3, 200, _benchmark("tokens", "--rounds", "12")),
    "proportional": Stage(3, 60, _benchmark("proportional")),
}  # fmt: skip
"""What gives most for its time comes first in each part."""


def run_stage(name: str, stage: Stage, out: Path) -> Outcome:
    """Run one stage, keep its output and the JSON files that it wrote, and append its line."""
    command = [sys.executable, *stage.command]
    print(f"== {name} (at most {stage.seconds} s): {' '.join(stage.command)}", flush=True)
    before, start = _written(), time.monotonic()
    with (out / f"{name}.log").open("w") as log:
        status = _run(command, stage.seconds, log)
    result = "too slow" if status is None else "failed" if status else "ok"
    seconds = round(time.monotonic() - start, 1)
    outcome = Outcome(name, result, status, seconds, " ".join(stage.command))
    for path, changed in _written().items():
        if before.get(path) != changed:
            shutil.copy2(path, out)
    with (out / "stages.jsonl").open("a") as lines:
        lines.write(json.dumps(asdict(outcome)) + "\n")
    print((out / f"{name}.log").read_text(errors="replace")[-4000:], flush=True)
    return outcome


def _run(command: Sequence[str], seconds: float, log: Any) -> int | None:
    """The exit status of a command; None if it was stopped after that many seconds."""
    process = subprocess.Popen(
        command, cwd=ROOT, env=_environment(), stdout=log, stderr=log, start_new_session=True
    )
    try:
        return process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:  # it, and the processes that it started
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _environment() -> dict[str, str]:
    paths = os.environ.get("PYTHONPATH") or os.pathsep.join((str(ROOT), str(ROOT / "backbones")))
    # test processes compile side by side, each with processes of its own
    return {"TORCHINDUCTOR_COMPILE_THREADS": "2", **os.environ, "PYTHONPATH": paths}


def _written() -> dict[Path, int]:
    """The files of results, and when each was written."""
    return {path: path.stat().st_mtime_ns for path in RESULTS.glob("*.json")}


def done_before(out: Path) -> set[str]:
    """Stages whose last line in ``stages.jsonl`` says that they ended well."""
    path = out / "stages.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    last = {row["stage"]: row["result"] for row in rows}
    return {name for name, result in last.items() if result == "ok"}


def chosen(names: Iterable[str], stages: Mapping[str, Stage]) -> dict[str, Stage]:
    """The stages that are named, by their name or by that of their part, in their order.

    Raises:
        ValueError: A name is unknown.
    """
    wanted = set(names)
    known = {*stages, *(f"part{stage.part}" for stage in stages.values())}
    if wanted - known:
        unknown = ", ".join(sorted(wanted - known))
        raise ValueError(f"unknown stage {unknown}; known: {', '.join([*sorted(known)])}")
    return {
        name: stage
        for name, stage in stages.items()
        if not wanted or name in wanted or f"part{stage.part}" in wanted
    }


def table(outcomes: Iterable[Outcome]) -> str:
    """A line for each stage: name, how it ended, seconds."""
    lines = [f"{'stage':13} {'result':9} {'seconds':>8}"]
    lines += [f"{row.stage:13} {row.result:9} {row.seconds:8.1f}" for row in outcomes]
    return "\n".join(lines)


def run(stages: Mapping[str, Stage], out: Path) -> int:
    """Run the stages, print the table, and return the exit status: 1 if any failed."""
    out.mkdir(parents=True, exist_ok=True)
    outcomes = [run_stage(name, stage, out) for name, stage in stages.items()]
    print(f"\n{table(outcomes)}")
    return int(any(outcome.result != "ok" for outcome in outcomes))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stages", nargs="*", metavar="STAGE")
    parser.add_argument("--out", type=Path, default=ROOT / "gpu-run")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--list", action="store_true")
    options = parser.parse_args(arguments)
    try:
        stages = chosen(options.stages, STAGES)
    except ValueError as error:
        parser.error(str(error))
    if options.list:
        for name, stage in stages.items():
            print(f"part{stage.part} {name:13} {stage.seconds:4} s  {' '.join(stage.command)}")
        return 0
    done = done_before(options.out) if options.resume else set()
    return run({name: stage for name, stage in stages.items() if name not in done}, options.out)


if __name__ == "__main__":
    sys.exit(main())
