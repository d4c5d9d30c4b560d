"""Tables of docs/methods.md: from the registry and ``results/accuracy-cifar.json``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import sparsiattn

RESULTS = Path(__file__).parent / "results"
DEFAULTS = {
    "random": "random k=0.25 background=None",
    "local": "local k=0.25 background=2",
    "topk": "topk k=0.25 background=None",
    "connectivity": "connectivity k=0.25 tile=1 background=2",
    "token_drop": "token_drop keep=0.7",
    "token_merge": "token_merge ratio=0.9",
    "hybrid": "hybrid k=0.25 keep=0.7 only_if_faster=False",
}
"""Rows of the accuracy benchmark for the core strategies, which have many."""


def _ours(kind: str) -> dict[str, Any]:
    return {
        name: info
        for name, info in sparsiattn.list_strategies().items()
        if info.plugin.startswith("sparsiattn") and (info.kind == "attention") == (kind == "keys")
        if name != "dense"
    }


def _read(name: str) -> dict[str, Any]:
    rows: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())["rows"]
    return rows


def _table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *rows])


def _matrix(kind: str) -> str:
    """What each is, where it comes from, how close to that, and whether it has to learn."""
    rows = []
    for name, info in _ours(kind).items():
        paper = f"[{info.paper.rsplit('/', 1)[-1]}]({info.paper})" if info.paper else ""
        training = "yes" if info.needs_training else "no"
        exact = "yes" if not info.inexact_reason else f"no: {info.inexact_reason}"
        rows.append(
            [f"`{name}`", info.summary.replace("|", "\\|"), paper, info.fidelity, training, exact]
        )
    head = [
        "strategy",
        "what it does",
        "paper",
        "how close to the paper",
        "must learn",
        "dense at full budget",
    ]
    return _table(head, rows)


def _measured(kind: str) -> str:
    accuracy = _read("accuracy-cifar")
    rows = []
    for name in _ours(kind):
        found = _row(name, "none", accuracy)
        cells = [_top1(found), _top1(_row(name, "calibrated", accuracy)), _macs(found)]
        rows.append([f"`{name}`", *cells])
    return _table(["strategy", "top-1", "calibrated", "MACs"], rows)


def _row(name: str, fit: str, rows: dict[str, Any]) -> dict[str, Any] | None:
    if name in DEFAULTS:
        fitted = name if fit == "none" else f"{name} {fit}"
        return rows.get(DEFAULTS[name].replace(name, fitted, 1))
    return next((r for r in rows.values() if (r["strategy"], r["fit"]) == (name, fit)), None)


def _top1(row: dict[str, Any] | None) -> str:
    return "" if row is None else f"{row['top1']:.2f}"


def _macs(row: dict[str, Any] | None) -> str:
    if row is None or not row.get("macs"):
        return ""
    return f"{100 * row['macs'] / row['macs_dense']:.0f} %"


BLOCKS = {
    "methods keys": lambda: _matrix("keys"),
    "methods tokens": lambda: _matrix("tokens"),
    "methods keys measured": lambda: _measured("keys"),
    "methods tokens measured": lambda: _measured("tokens"),
}
