"""The table of runtimes in docs/compare.md, from ``results/runtimes-cpu.json``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def runtimes() -> str:
    """Times, their ratio and what is kept, one line for each model and runtime."""
    found: dict[str, Any] = json.loads((RESULTS / "runtimes-cpu.json").read_text())
    head = ["model", "runtime", "dense", "patched", "ratio", "cosine, dense", "cosine, patched"]
    lines = [head, ["---"] * len(head)]
    cases = list(dict.fromkeys(name.split(",")[0] for name in found["rows"]))
    for name, row in sorted(found["rows"].items(), key=lambda x: cases.index(x[0].split(",")[0])):
        case, _, runtime = name.partition(", batch ")
        batch, _, runtime = runtime.partition(", ")
        weights = "" if row["real_weights"] else ", random weights"
        lines.append([f"{case}, batch {batch}{weights}", runtime, *_cells(row)])
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    return f"{table}\n\n{versions}."


def _cells(row: dict[str, Any]) -> list[str]:
    if "ratio" not in row:
        return ["", "", row.get("left_out") or f"`{row['failed']}`", "", ""]
    cosines = [f"{row['cosine'][side]['tokens']:.4f}" for side in ("dense", "patched")]
    times = [f"{row[f'{side}_ms']:,.0f} ms" for side in ("dense", "patched")]
    return [*times, f"{row['ratio']:.2f}x", *cosines]


BLOCKS = {"runtimes": runtimes}
