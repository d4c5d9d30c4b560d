"""The table of the load test in docs/tutorials/export.md, from ``results/serving-cpu.json``."""

from __future__ import annotations

import json
from pathlib import Path

FILE = Path(__file__).parent / "results" / "serving-cpu.json"


def serving() -> str:
    head = [
        "model",
        "wrong answers",
        "requests per second",
        "median time",
        "99th percentile",
        "memory after 10 % of requests, at the end",
    ]
    lines = [head, ["---"] * len(head)]
    runs = json.loads(FILE.read_text())["rows"]
    for model, row in ((model, row) for model, rows in runs.items() for row in rows):
        memory = row["memory_mb"]
        lines.append([
            model, f"{row['wrong']} of {row['requests']:,}", str(row["per_second"]),
            f"{row['median_ms']:.0f} ms", f"{row['p99_ms']:.0f} ms",
            f"{memory[len(memory) // 10]:.0f} MB, {memory[-1]:.0f} MB",
        ])  # fmt: skip
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


BLOCKS = {"serving": serving}
