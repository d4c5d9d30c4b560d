"""Draws ``docs/assets/accuracy-keys.svg`` and ``accuracy-tokens.svg``, and both as ``NAME-dark``,
from ``results/accuracy-cifar.json``: ``python benchmarks/accuracy_plots.py``."""

from __future__ import annotations

import json
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot as plt
from plots import COLOURS, MARKERS, RESULTS, draw, muted

Rows = dict[str, dict[str, Any]]
BUDGETS, KEEPS = (0.05, 0.1, 0.25, 0.5), (0.9, 0.7, 0.5)
KEYS = {
    "exact top-k": "topk k={k} background={g}",
    "connectivity, calibrated": "connectivity calibrated k={k} tile=1 background={g}",
    "connectivity, untrained": "connectivity k={k} tile=1 background={g}",
    "nearest patches": "local k={k} background={g}",
    "random": "random k={k} background={g}",
}
TOKENS = {
    "drop (class attention)": "token_drop keep={k}",
    "drop, rest fused": "token_drop keep={k} fuse=True",
    "merge": "token_merge ratio={k}",
    "drop + connectivity k=0.25": "hybrid k=0.25 keep={k} only_if_faster=False",
}


def line(axes: Any, order: int, label: str, points: list[tuple[float, float]]) -> None:
    style = {"color": COLOURS[order], "marker": MARKERS[order], "label": label}
    axes.plot(*zip(*points, strict=True), **style)


def dense_line(axes: Any, rows: Rows) -> None:
    axes.axhline(rows["dense"]["top1"], color=muted(), linestyle="--", label="dense")


def keys(rows: Rows) -> Any:
    """Top-1 against the budget of keys, without and with summary keys."""
    figure, panels = plt.subplots(1, 2, figsize=(9.5, 4), sharey=True)
    for axes, (pooled, title) in zip(
        panels, ((None, "dropped keys are gone"), (2, "2 x 2 summary keys")), strict=True
    ):
        dense_line(axes, rows)
        for order, (label, name) in enumerate(KEYS.items()):
            found = [(k, name.format(k=k, g=pooled)) for k in BUDGETS]
            points = [(100 * k, rows[n]["top1"]) for k, n in found if n in rows]
            if points:
                line(axes, order, label, points)
        axes.set(xscale="log", xticks=[5, 10, 25, 50], title=title, xlabel="keys kept (%)")
        axes.xaxis.set_major_formatter(mpl.ticker.ScalarFormatter())
        axes.xaxis.set_minor_locator(mpl.ticker.NullLocator())
    panels[0].set_ylabel("top-1 (%)")
    panels[1].legend(loc="lower right", fontsize=9)
    figure.tight_layout()
    return figure


def tokens(rows: Rows) -> Any:
    """Top-1 against the multiply-accumulates that are left."""
    figure, axes = plt.subplots(figsize=(6.5, 4))
    dense_line(axes, rows)
    for order, (label, name) in enumerate(TOKENS.items()):
        found = [rows[name.format(k=k)] for k in KEEPS if name.format(k=k) in rows]
        points = [(100 * row["macs"] / row["macs_dense"], row["top1"]) for row in found]
        if points:
            line(axes, order, label, points)
    axes.set(xlabel="MACs left of the model's (%)", ylabel="top-1 (%)")
    axes.legend(loc="lower right", fontsize=9)
    figure.tight_layout()
    return figure


def main() -> None:
    rows = json.loads((RESULTS / "accuracy-cifar.json").read_text())["rows"]
    draw("accuracy-keys", lambda: keys(rows))
    draw("accuracy-tokens", lambda: tokens(rows))


if __name__ == "__main__":
    main()
