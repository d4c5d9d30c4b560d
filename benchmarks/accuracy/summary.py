"""From rows to the figures the docs show: means and spreads over seeds, and the claims checked."""

from __future__ import annotations

import re
from collections import defaultdict
from statistics import mean, stdev
from typing import Any

Rows = dict[str, dict[str, Any]]


def over_seeds(rows: Rows) -> Rows:
    """Rows that differ in their seed alone become one, with the mean and the spread of top-1."""
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for name, row in rows.items():
        groups[re.sub(r" seed=\d+$", "", name)].append(row)
    return {name: _joined(group) for name, group in groups.items()}


def _joined(group: list[dict[str, Any]]) -> dict[str, Any]:
    joined = dict(group[0])
    for key in ("top1", "agreement"):
        values = [row[key] for row in group]
        joined[key] = round(mean(values), 2)
        joined[f"{key}_spread"] = round(stdev(values), 2) if len(values) > 1 else None
    joined["seeds"] = len(group)
    return joined


def claims(rows: Rows) -> list[dict[str, Any]]:
    """What is to be reproduced, by how much each holds: ``gap`` against ``allowed`` points."""
    dense = rows["dense"]["top1"]
    found = [
        _claim(f"{fit} k={k}, background {g}, against dense", dense, rows, _fit(fit, k, g=g), most)
        for fit, k, most in (
            ("calibrated", 0.25, 0.2), ("calibrated", 0.1, 1.0), ("trained", 0.1, 0.4),
        )
        for g in (2, 4)
    ]  # fmt: skip
    found += [
        _claim(f"{fit} k={k}, reduce=2, background {g}, against dense", dense, rows,
               f"{_fit(fit, k, g=g)} reduce=2".replace(" untrained", ""), most)
        for fit in ("untrained", "calibrated")
        for k, most in ((0.25, 0.2), (0.1, 1.0))
        for g in (2, 4)
    ]  # fmt: skip
    finest = f"{_fit('trained', 0.1, g=4)} reduce=2"
    title = "trained k=0.1, reduce=2, background 4, against dense"
    found.append(_claim(title, dense, rows, finest, 0.4))
    drop = rows.get("token_drop trained keep=0.7", {}).get("top1")
    hybrid = "hybrid trained k=0.25 keep=0.7 only_if_faster=False"
    found.append(_claim("hybrid (.7, .25) against the drop alone", drop, rows, hybrid, 0.3))
    for fit, k in (("calibrated", 0.25), ("calibrated", 0.1), ("trained", 0.1)):
        alone = rows.get(_fit(fit, k), {}).get("top1")
        found.append(_claim(f"{fit} tiles against tile 1 at k={k}", alone, rows,
                            _fit(fit, k, "2x2"), 0.2))  # fmt: skip
    return found + _order(rows)


def _order(rows: Rows) -> list[dict[str, Any]]:
    """Connectivity beats local and random at every budget, with and without background."""
    found = []
    for k in (0.5, 0.25, 0.1, 0.05):
        for background in (None, 2):
            name = f"connectivity calibrated k={k} tile=1 background={background}"
            for other in ("local", "random"):
                against = rows.get(f"{other} k={k} background={background}", {}).get("top1")
                title = f"{other} against connectivity at k={k}, background={background}"
                found.append(_claim(title, against, rows, name, 0.0))
    return found


def _fit(fit: str, k: float, tile: str = "1", g: int = 2) -> str:
    return f"connectivity {fit} k={k} tile={tile} background={g}"


def _claim(title: str, reference: float | None, rows: Rows, name: str, allowed: float) -> Any:
    top1 = rows.get(name, {}).get("top1")
    if reference is None or top1 is None:
        return {"claim": title, "gap": None, "allowed": allowed, "holds": None}
    gap = round(reference - top1, 2)
    return {"claim": title, "gap": gap, "allowed": allowed, "holds": gap <= allowed}
