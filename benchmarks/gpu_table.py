"""The rows of a run on a GPU in one file and as one table; needs neither torch nor a GPU."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

STAGES_FILE = "stages.jsonl"


def rows_of(out: Path) -> Iterator[dict[str, Any]]:
    """The rows of all programs, the last one of each name; lines cut short are left out."""
    for path in sorted(out.glob("*.jsonl")):
        if path.name == STAGES_FILE:
            continue
        rows: dict[str, dict[str, Any]] = {}
        for line in path.read_text().splitlines():
            with suppress(ValueError):
                row = json.loads(line)
                rows[row["row"]] = row
        yield from rows.values()


def collect(out: Path, stages: Sequence[Mapping[str, Any]]) -> Path:
    """Write all rows so far to ``gpu.json``."""
    rows = list(rows_of(out))
    content = {
        "fake": any(row.get("fake") for row in rows),
        "stages": list(stages),
        "rows": with_ratios(rows),
    }
    path = out / "gpu.json"
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path


def with_ratios(given: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows, with their speed relative to the fastest dense row of the same case.

    A name is a case and a line, with " | " between them; dense lines start with "dense", "padded"
    or "ragged, padded" or have it after "training, ". Times from a graph are compared with such.
    """
    rows = [dict(row) for row in given]
    for field, ratio in (("ms", "ratio"), ("graph_ms", "graph_ratio")):
        best: dict[str, float] = {}
        for row in rows:
            if _is_dense(row["row"]) and row.get(field):
                group = _group(row["row"])
                best[group] = min(best.get(group, row[field]), row[field])
        for row in rows:
            dense = best.get(_group(row["row"]))
            if dense and row.get(field):
                row[ratio] = round(dense / row[field], 2)
    return rows


def _parts(name: str) -> tuple[str, str, str]:
    """Case, line, and what is behind the line: batch, mode."""
    case, _, rest = name.partition(" | ")
    line, _, more = rest.partition(" | ")
    return case, line, more


def _is_dense(name: str) -> bool:
    line = _parts(name)[1].removeprefix("training, ").removeprefix("ragged, ")
    return line.split(" ")[0] in ("dense", "padded")


def _group(name: str) -> str:
    """What a row is compared within: the case, whether it trains, and batch and mode."""
    case, line, more = _parts(name)
    return f"{case} | {line.startswith('training, ')} | {more}"


def table_of_rows(out: Path) -> str:
    """A line for each row: milliseconds and speed, or why there are none."""
    rows = with_ratios(rows_of(out))
    wide = max((len(row["row"]) for row in rows), default=3)
    lines = [f"{'row':{wide}} {'ms':>9} {'x':>6} {'graph ms':>9} {'x':>6}"]
    for row in rows:
        cells = (row.get("ms"), row.get("ratio"), row.get("graph_ms"), row.get("graph_ratio"))
        figures = " ".join(
            f"{_text(cell):>{width}}" for cell, width in zip(cells, (9, 6, 9, 6), strict=True)
        )
        lines.append(f"{row['row']:{wide}} {figures} {_remark(row)}".rstrip())
    return "\n".join(lines)


def _text(cell: object) -> str:
    return "-" if cell is None else f"{cell:g}"


def _remark(row: Mapping[str, Any]) -> str:
    remarks = [f"{name}: {row[name]}"[:160] for name in ("failed", "refused", "no_graph")
               if name in row]  # fmt: skip
    if row.get("fake"):
        remarks.insert(0, "fake" + (f", {row['launches']} launches" if "launches" in row else ""))
    return "; ".join(remarks)
