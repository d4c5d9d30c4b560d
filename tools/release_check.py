"""Runs all checks of a release and prints which passed; `make release-check` calls it.

    python tools/release_check.py [STEP ...]    # all steps, or those that are named

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
# short ones first; twine-check reads what wheel leaves in dist/
STEPS = {
    "versions": "all files state one version",
    "api-check": "public names are those written down",
    "wheel": "sdist and wheel, at work in a clean environment",
    "twine-check": "their metadata, as the index reads them",
    "docs": "the site, strictly",
    "audit": "known vulnerabilities",
    "plugin-check": "a plug-in of another package",
    "test": "lint, types, fast tests",
    "test-oldest": "fast tests on the oldest versions",
}


@dataclass(frozen=True)
class Outcome:
    """How one step ended."""

    step: str
    passed: bool
    seconds: float


def run_step(step: str, command: Sequence[str]) -> Outcome:
    """Run one command in the checkout; its output is shown as it comes."""
    print(f"\n== {step}: {' '.join(command)}", flush=True)
    start = time.monotonic()
    try:
        passed = subprocess.run(command, cwd=ROOT, check=False).returncode == 0
    except OSError as error:
        print(f"{command[0]} cannot be started: {error}", flush=True)
        passed = False
    return Outcome(step, passed, time.monotonic() - start)


def run_steps(commands: Mapping[str, Sequence[str]]) -> list[Outcome]:
    """Run all of them, one after the other, whatever each returns."""
    return [run_step(step, command) for step, command in commands.items()]


def table(outcomes: Iterable[Outcome]) -> str:
    """A line for each step: name, ok or FAILED, seconds, what it checks."""
    lines = [f"{'step':13} {'result':7} {'seconds':>8}  checks"]
    for outcome in outcomes:
        result = "ok" if outcome.passed else "FAILED"
        what = STEPS.get(outcome.step, "")
        lines.append(f"{outcome.step:13} {result:7} {outcome.seconds:8.1f}  {what}".rstrip())
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
        print(f"unknown step {', '.join(unknown)}; known: {', '.join(STEPS)}", file=sys.stderr)
        return 2
    make = os.environ.get("MAKE", "make")
    return check({step: [make, "--no-print-directory", step] for step in chosen or STEPS})


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
