"""The table of reliability figures, from ``results/reliability-cpu.json``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
FUZZ = {
    "models": "patched models on random inputs",
    "kernels": "kernels on random calls",
    "options": "options out of range or of wrong types",
    "saved": "patches that were saved, damaged and loaded",
}


def reliability() -> str:
    """What was tried, how often, and how much of it went wrong."""
    found = json.loads((RESULTS / "reliability-cpu.json").read_text())
    parts: dict[str, dict[str, Any]] = found["parts"]
    rows = [_fuzz(parts, kind, what) for kind, what in FUZZ.items()]
    makers = {"threads": _threads, "cycles": _cycles}
    makers |= {"determinism": _determinism, "halves": _halves}
    rows += [make(parts[name]) for name, make in makers.items() if name in parts]
    rows.append(_injected(parts))
    for what, row in parts.get("kills", {}).items():
        if isinstance(row, dict):
            rows.append([f"kill -9 while {what}", f"{row['kills']} kills", str(row["wrong"])])
    lines = [["test", "runs", "failures"], ["---"] * 3, *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _fuzz(parts: dict[str, dict[str, Any]], kind: str, what: str) -> list[str]:
    mine = [row for name, row in parts.items() if name.startswith(f"fuzz {kind}")]
    cases, wrong = (sum(row[key] for row in mine) for key in ("cases", "wrong"))
    return [what, f"{cases:,} cases", str(wrong)]


def _threads(row: dict[str, Any]) -> list[str]:
    what = f"{row['threads']} threads, patched and unpatched models, bit for bit"
    return [what, f"{row['forwards']:,} forward passes", str(row["wrong"])]


def _cycles(row: dict[str, Any]) -> list[str]:
    first, last = row["objects"][0], row["objects"][-1]
    grown = row["resident_mib"][-1] - row["resident_mib"][1]
    what = f"patch and unpatch; second half: {last - first:+d} objects, {grown:+.1f} MiB"
    return [what, f"{row['cycles']:,} cycles", str(len(row["changed_models"]) + row["hooks_left"])]


def _injected(parts: dict[str, dict[str, Any]]) -> list[str]:
    mine = [row for name, row in parts.items() if name.startswith("injected")]
    points, checks, wrong = (sum(row[key] for row in mine) for key in ("points", "checks", "wrong"))
    return [f"exceptions and interrupts at {points:,} points", f"{checks:,} checks", str(wrong)]


def _determinism(row: dict[str, Any]) -> list[str]:
    apart = row["largest_batch_difference"]
    what = (
        f"same bits in {row['processes']} processes; alone and in a batch at most {apart:.0e} apart"
    )
    wrong = len(row["differ_between_processes"]) + len(row["differ_within_one"])
    return [what, f"{row['strategies']} strategies", str(wrong)]


def _halves(row: dict[str, Any]) -> list[str]:
    checked = sum(one["checked"] for one in row["rows"].values())
    return [
        "half precision, up to the limits of its range",
        f"{checked} patches",
        str(row["wrong"]),
    ]


BLOCKS = {"reliability": reliability}
