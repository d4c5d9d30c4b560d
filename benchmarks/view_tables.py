"""Tables of docs/tutorials/views.md from ``results/many-views-*.json``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def _read(name: str) -> list[dict[str, Any]]:
    return _rows(f"many-views-{name}")


def _rows(name: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((RESULTS / f"{name}.json").read_text())["rows"]
    return rows


def _table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *rows])


def _line(row: dict[str, Any]) -> str:
    tile = row["tile"] if isinstance(row["tile"], int) else tuple(row["tile"])
    return f"`k={row['k']}, tile={tile}`"


def layer() -> str:
    """One row for each number of views, one column for each setting."""
    rows = _read("layer")
    lines = list(dict.fromkeys(map(_line, rows)))
    body = []
    sizes = dict.fromkeys((row["views"], row["tokens"], row["heads"]) for row in rows)
    for views, tokens, heads in sizes:
        ratios = {_line(row): f"{row['ratio']:.2f}x" for row in rows if row["views"] == views}
        body.append([str(views), f"{tokens:,}", str(heads), *(ratios.get(x, "") for x in lines)])
    return _table(["views", "tokens", "heads", *lines], body)


def recall() -> str:
    """One row for each setting without its budget, one column for each budget."""
    rows = _read("recall")
    shares = sorted({row["line"].rpartition("k=")[2] for row in rows}, key=float)
    by_line: dict[str, dict[str, float]] = {}
    for row in rows:
        line, _, share = row["line"].rpartition(", k=")
        by_line.setdefault(line, {})[share] = row["recall"]
    body = [
        [f"`{line.removeprefix('strategy=')}`", *(f"{found[share]:.3f}" for share in shares)]
        for line, found in by_line.items()
    ]
    return _table(["strategy", *(f"k = {share}" for share in shares)], body)


def memory() -> str:
    """Peak of one call."""
    body = [
        [str(row["views"]), f"{row['tokens']:,}", str(row["heads"]), f"{row['peak_mb']:,} MB"]
        for row in _read("memory")
    ]
    return _table(["views", "tokens", "heads", "peak memory beside q, k, v and the output"], body)


def encoders() -> str:
    """Whole encoders, beside what attention for nothing would give."""
    body = [
        [row["about"], f"`{row['line']}`", f"{row['ratio']:.2f}x", f"{row['limit']:.2f}x"]
        for row in _rows("long-sequences")
    ]
    return _table(["encoder", "setting", "speed", "attention for nothing"], body)


def key_mass() -> str:
    """Lists of one length and lists that end by mass, by the keys that they keep."""
    body = []
    for row in sorted(_rows("key-mass"), key=lambda row: (row["model"], row["share"])):
        size = f"{row['size']} px"
        kind = f"mass {row['mass']}, at least {row['least']}" if "mass" in row else "one length"
        body.append([row["model"], size, kind, f"{row['share']:.3f}", f"{row['patches']:.4f}"])
    return _table(["model", "image", "lists", "keys kept", "cosine of patches"], body)


BLOCKS = {
    "many views layer": layer,
    "many views recall": recall,
    "many views memory": memory,
    "long sequences": encoders,
    "key mass": key_mass,
}
