"""The table of runtimes in docs/compare.md, from ``results/runtimes-cpu.json``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
NAMES = {
    "vit-s-1024": "ViT-S/16, 1,024 pixels",
    "deit-s-224": "DeiT-S, 224 pixels",
    "s14-518": "ViT-S/14, 518 pixels",
}


def runtimes() -> str:
    """Times, their ratio and what is kept: a table for each model and batch size."""
    found: dict[str, Any] = json.loads((RESULTS / "runtimes-cpu.json").read_text())
    cases: dict[str, list[list[str]]] = {}
    for name, row in sorted(found["rows"].items(), key=lambda item: list(NAMES).index(_case(item))):
        case, _, runtime = name.partition(", batch ")
        batch, _, runtime = runtime.partition(", ")
        weights = "real weights" if row["real_weights"] else "random weights"
        images = "one image" if batch == "1" else f"{batch} images"
        title = f"**{NAMES[case]}, {images}, {weights}**"
        cases.setdefault(title, []).append([runtime, *_cells(row)])
    tables = "\n\n".join(f"{title}\n\n{_table(rows)}" for title, rows in cases.items())
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    return f"{tables}\n\n{versions}."


def _case(item: tuple[str, Any]) -> str:
    return item[0].split(",")[0]


def _table(rows: list[list[str]]) -> str:
    head = ["runtime", "dense", "patched", "ratio", "cosine, dense", "cosine, patched"]
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cells(row: dict[str, Any]) -> list[str]:
    if "ratio" not in row:
        return ["", "", row.get("left_out") or f"`{row['failed']}`", "", ""]
    cosines = [f"{row['cosine'][side]['tokens']:.4f}" for side in ("dense", "patched")]
    times = [f"{row[f'{side}_ms']:,.0f} ms" for side in ("dense", "patched")]
    return [*times, f"{row['ratio']:.2f}x", *cosines]


BLOCKS = {"runtimes": runtimes}
