"""The table of exported programs in docs/tutorials/export.md, from ``results/export-cpu.json``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from reworded import reworded

RESULTS = Path(__file__).parent / "results"
FORMATS = {"pt2": "torch.export", "onnx": "ONNX in onnxruntime", "aoti": "AOTInductor"}


def exported() -> str:
    """Differences, and below them the reasons of refusals, numbered."""
    rows: dict[str, Any] = json.loads((RESULTS / "export-cpu.json").read_text())["rows"]
    names = dict.fromkeys(name.rpartition(", ")[0] for name in rows)
    lines, reasons = [["strategy", *FORMATS.values()], ["---"] * (1 + len(FORMATS))], [""]
    for name in names:
        cells = [_cell(rows.get(f"{name}, {one}"), reasons) for one in FORMATS]
        lines.append([f"`{name}`", *cells])
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return "\n".join(
        [table, "", *(f"{i}. `{reworded(text)}`" for i, text in enumerate(reasons) if i)]
    )


def _cell(row: dict[str, Any] | None, reasons: list[str]) -> str:
    if row is None:
        return ""
    if "refused" not in row:
        return f"{row['max_difference']:.1e}"
    if row["refused"] not in reasons:
        reasons.append(row["refused"])
    return f"refused [{reasons.index(row['refused'])}]"


BLOCKS = {"exported": exported}
