"""Runs all checks of a release and prints the result of each; `make release-check` calls it.

    python tools/release_check.py [STEP ...]    # all steps by default

Each step is a make target. A step that fails does not stop the others. Exits 1 if any failed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# short steps first; twine-check reads the files that wheel writes to dist/
STEPS = {
    "versions": "all files state the same version",
    "api-check": "public names match the API snapshot",
    "wheel": "sdist and wheel work in a clean environment",
    "twine-check": "metadata of sdist and wheel, by the rules of PyPI",
    "docs": "the documentation builds without warnings",
    "audit": "no known vulnerabilities in dependencies",
    "plugin-check": "a plug-in in a package of its own works",
    "test": "lint, types, fast tests",
    "test-oldest": "fast tests on the oldest versions",
}


@dataclass(frozen=True)
class Outcome:
    """Result of one step.

    Attributes:
        step: Name of the step, a key of `STEPS`.
        passed: Whether its command exited with 0.
        seconds: Wall-clock time.
    """

    step: str
    passed: bool
    seconds: float


def run_step(step: str, command: Sequence[str]) -> Outcome:
    """Run one command in the checkout, and show its output as it is printed."""
    print(f"\n== {step}: {' '.join(command)}", flush=True)
    start = time.monotonic()
    try:
        passed = subprocess.run(command, cwd=ROOT, check=False).returncode == 0
    except OSError as error:
        print(f"{command[0]} could not be started: {error}", flush=True)
        passed = False
    return Outcome(step, passed, time.monotonic() - start)


def run_steps(commands: Mapping[str, Sequence[str]]) -> list[Outcome]:
    """Run all commands one after the other, also after a failure."""
    return [run_step(step, command) for step, command in commands.items()]


def table(outcomes: Iterable[Outcome]) -> str:
    """Return a table with a line for each step: name, ok or FAILED, seconds, what it checks."""
    lines = [f"{'step':13} {'result':7} {'seconds':>8}  checks"]
    for outcome in outcomes:
        result = "ok" if outcome.passed else "FAILED"
        checks = STEPS.get(outcome.step, "")
        lines.append(f"{outcome.step:13} {result:7} {outcome.seconds:8.1f}  {checks}".rstrip())
    return "\n".join(lines)


def check(commands: Mapping[str, Sequence[str]]) -> int:
    """Run the commands, print the table, and return the exit status: 1 if any failed."""
    outcomes = run_steps(commands)
    failed = [outcome.step for outcome in outcomes if not outcome.passed]
    print("\n" + table(outcomes))
    print(f"failed: {', '.join(failed)}" if failed else "all passed")
    return int(bool(failed))


def main(chosen: list[str]) -> int:
    unknown = [step for step in chosen if step not in STEPS]
    if unknown:
        print(f"unknown step {', '.join(unknown)}; choose from {', '.join(STEPS)}", file=sys.stderr)
        return 2
    make = os.environ.get("MAKE", "make")
    return check({step: [make, "--no-print-directory", step] for step in chosen or STEPS})


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
