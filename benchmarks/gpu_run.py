"""Everything that needs a GPU: a smoke test, the tests marked ``gpu``, then the benchmarks.

    python benchmarks/gpu_run.py --list                   # stages, their parts and budgets
    python benchmarks/gpu_run.py [STAGE ...] --out DIR    # all stages, or those named
    python benchmarks/gpu_run.py part1                    # the stages of one part
    python benchmarks/gpu_run.py --fake                   # walk all lines without a GPU

Each part takes less than nine minutes and is useful alone: smoke test and tests; kernels; whole
models and `tune`. Each stage is a process with a time budget of its own, and one that fails or
takes too long does not stop the others.

Programs append each row to ``DIR/*.jsonl`` as they make it; a row that fails says why. As a stage
ends, a line is appended to ``DIR/stages.jsonl``, its output is in ``DIR/STAGE.log``, and
``DIR/gpu.json`` has all rows so far: copy it to ``benchmarks/results``. The table at the end shows
them. ``--resume`` leaves out stages that ended well before, and in others the rows that are there.
With ``--fake`` no stage has a time budget, and every row is marked. Exits 1 if any stage failed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gpu_table import collect, table_of_rows

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Stage:
    """One process.

    Attributes:
        part: The part of the run that it belongs to.
        seconds: Its time budget.
        command: Arguments of Python.
        rows: Whether it is a program that takes the options of `gpu_device.arguments`.
    """

    part: int
    seconds: int
    command: tuple[str, ...]
    rows: bool = False


@dataclass(frozen=True)
class Run:
    """The options of a run: the folder of its files, and how its stages run."""

    out: Path
    resume: bool = False
    fake: bool = False

    def command(self, stage: Stage) -> tuple[str, ...]:
        """Arguments of Python for a stage."""
        if not stage.rows:
            return (*stage.command, "--collect-only") if self.fake else stage.command
        flags = (("--resume", self.resume), ("--fake", self.fake))
        return (*stage.command, "--out", str(self.out), *(name for name, on in flags if on))


@dataclass(frozen=True)
class Outcome:
    """How one stage ended; ``result`` is ``"ok"``, ``"failed"`` or ``"too slow"``."""

    stage: str
    result: str
    status: int | None
    seconds: float
    command: str
    fake: bool = False


def _tests() -> tuple[str, ...]:
    """The tests, each with a time limit, in processes side by side, where pytest can do so."""
    command = "-m pytest tests/kernels/test_gpu.py -m gpu -q -p no:benchmark -p no:cacheprovider"
    if importlib.util.find_spec("pytest_timeout") is not None:
        command += " --timeout=150"
    if importlib.util.find_spec("xdist") is not None:
        command += f" -n {max(1, min(12, (os.cpu_count() or 1) - 2))}"
    return tuple(command.split())


def _program(part: int, seconds: int, name: str, *options: str) -> Stage:
    return Stage(part, seconds, (f"benchmarks/{name}.py", *options), rows=True)


STAGES = {
    "smoke": _program(1, 120, "gpu_smoke"),
    "tests": Stage(1, 400, _tests()),
    "forward": _program(2, 200, "gpu_kernels", "--set", "forward"),
    "backward": _program(2, 60, "gpu_kernels", "--set", "backward"),
    "ragged": _program(2, 40, "gpu_kernels", "--set", "ragged"),
    "sizes": _program(2, 80, "gpu_kernels", "--set", "sizes"),
    "flex": _program(2, 150, "gpu_kernels", "--set", "flex"),
    "models": _program(3, 390, "gpu_models"),
    "tune": _program(3, 140, "gpu_tune"),
}
"""What gives most for its time comes first in each part."""


def run_stage(name: str, stage: Stage, run: Run) -> Outcome:
    """Run one stage, keep its output, and append its line."""
    command, out, start = run.command(stage), run.out, time.monotonic()
    seconds = None if run.fake else stage.seconds
    limit = "no limit" if seconds is None else f"at most {seconds} s"
    print(f"== {name} ({limit}): {' '.join(command)}", flush=True)
    with (out / f"{name}.log").open("w") as log:
        status = _run([sys.executable, *command], seconds, log)
    result = "too slow" if status is None else "failed" if status else "ok"
    took = round(time.monotonic() - start, 1)
    outcome = Outcome(name, result, status, took, " ".join(command), run.fake)
    with (out / "stages.jsonl").open("a") as lines:
        lines.write(json.dumps(asdict(outcome)) + "\n")
    print((out / f"{name}.log").read_text(errors="replace")[-4000:], flush=True)
    return outcome


def _run(command: Sequence[str], seconds: float | None, log: Any) -> int | None:
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


def done_before(out: Path, *, fake: bool) -> set[str]:
    """Stages whose last line of the same kind of run in ``stages.jsonl`` says they ended well."""
    path = out / "stages.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    last = {row["stage"]: row["result"] for row in rows if row["fake"] == fake}
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


def run_all(stages: Mapping[str, Stage], run: Run) -> int:
    """Run the stages, print the tables, and return the exit status: 1 if any failed."""
    run.out.mkdir(parents=True, exist_ok=True)
    outcomes = []
    for name, stage in stages.items():
        outcomes.append(run_stage(name, stage, run))
        collect(run.out, [asdict(outcome) for outcome in outcomes])
    print(f"\n{table_of_rows(run.out)}\n\n{table(outcomes)}")
    return int(any(outcome.result != "ok" for outcome in outcomes))


def table(outcomes: Iterable[Outcome]) -> str:
    """A line for each stage: name, how it ended, seconds."""
    lines = [f"{'stage':13} {'result':9} {'seconds':>8}"]
    lines += [f"{row.stage:13} {row.result:9} {row.seconds:8.1f}" for row in outcomes]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stages", nargs="*", metavar="STAGE")
    parser.add_argument("--out", type=Path, default=ROOT / "gpu-run")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--fake", action="store_true")
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
    done = done_before(options.out, fake=options.fake) if options.resume else set()
    todo = {name: stage for name, stage in stages.items() if name not in done}
    return run_all(todo, Run(options.out.resolve(), options.resume, options.fake))


if __name__ == "__main__":
    sys.exit(main())
