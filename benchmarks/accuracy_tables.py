"""Tables of docs/accuracy.md from ``results/accuracy-cifar.json``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
BUDGETS, KEEPS = (0.5, 0.25, 0.1, 0.05), (0.9, 0.7, 0.5)
CORE = ["random", "local", "topk", "connectivity", "token_drop", "token_merge", "hybrid"]
"""Those at many budgets; `method_tables` compares all at one."""
Row = dict[str, Any]


def _read() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / "accuracy-cifar.json").read_text())
    return found


def _core() -> list[Row]:
    return [row for row in _read()["rows"].values() if row["strategy"] in CORE]


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _grouped(rows: list[Row], column: str) -> Iterator[tuple[str, str, dict[float, Row]]]:
    """Strategy with its options but one, what was fitted, and its rows by that option."""
    groups: dict[tuple[str, str], dict[float, Row]] = {}
    for row in rows:
        options = {k: v for k, v in row["options"].items() if k not in (column, "layers")}
        options.pop("only_if_faster", None)
        said = ", ".join(f"{name} {_text(value)}" for name, value in options.items())
        label = f"`{row['strategy']}`" + (f", {said}" if said else "")
        fit = "" if row["fit"] == "none" else row["fit"]
        groups.setdefault((label, fit), {})[row["options"][column]] = row
    return ((*group, found) for group, found in groups.items())


def _text(value: Any) -> str:
    if value is None:
        return "none"
    return " x ".join(map(str, value)) if isinstance(value, list) else str(value)


def _score(row: Row | None) -> str:
    if row is None:
        return ""
    spread = f" ± {row['top1_spread']:.2f}" if row.get("top1_spread") is not None else ""
    return f"{row['top1']:.2f}{spread} ({row['agreement']:.1f})"


def attention() -> str:
    """Top-1 and agreement with the dense model of every attention strategy, by budget."""
    rows = [row for row in _core() if set(row["options"]) & {"k"}]
    rows = [row for row in rows if "keep" not in row["options"]]
    body = [
        [label, fit, *(_score(found.get(k)) for k in BUDGETS), _speed(found.get(0.1))]
        for label, fit, found in _grouped(rows, "k")
    ]
    head = ["strategy and options", "fitted", *(f"k = {k}" for k in BUDGETS), "speed, k = 0.1"]
    return _table(head, body)


def tokens() -> str:
    """The same of strategies that make tokens fewer, with what is left of the model's MACs."""
    rows = [row for row in _core() if {"keep", "ratio"} & set(row["options"])]
    body = []
    for row in rows:
        row["options"]["keep"] = row["options"].pop("ratio", row["options"].get("keep"))
    for label, fit, found in _grouped(rows, "keep"):
        rows_of = [found.get(k) for k in KEEPS]
        cells = [", ".join(filter(None, (_score(r), _left(r), _speed(r)))) for r in rows_of]
        body.append([label, fit, *cells])
    return _table(["strategy and options", "fitted", *(f"keep = {k}" for k in KEEPS)], body)


def _left(row: Row | None) -> str:
    if row is None or row.get("macs") is None:
        return ""
    return f"{100 * row['macs'] / row['macs_dense']:.0f} %"


def _speed(row: Row | None) -> str:
    """Images a second, patched over dense, where that was measured."""
    return f"{row['speed']['ratio']:.2f}x" if row is not None and "speed" in row else ""


def claims() -> str:
    """What was to be reproduced, the gap in points of top-1, and whether it is within bounds."""
    said = {True: "yes", False: "no", None: "not run"}
    body = [
        [c["claim"], "" if c["gap"] is None else f"{c['gap']:+.2f}", f"{c['allowed']:.1f}",
         said[c["holds"]]]
        for c in _read()["claims"]
    ]  # fmt: skip
    return _table(["claim", "points below", "allowed", "holds"], body)


def dense() -> str:
    found = _read()
    row, trained = found["rows"]["dense"], found["rows"].get("dense trained")
    text = f"The dense model has {row['top1']:.2f} % top-1 on {found['images']:,} test images"
    if trained is None:
        return f"{text}."
    return f"{text}; {_score(trained)} after the same further training as the *trained* rows."


BLOCKS = {
    "accuracy dense": dense,
    "accuracy attention": attention,
    "accuracy tokens": tokens,
    "accuracy claims": claims,
}
