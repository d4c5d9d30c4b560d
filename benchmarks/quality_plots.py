"""Draws quality against speed from the study of ``python benchmarks/quality``.

``python benchmarks/quality_plots.py`` writes ``quality-speed-light.svg`` and ``-dark.svg`` into
``docs/assets``: a panel for each model, a point for each line, and the frontier, which is made of
the lines that no other beats in both.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import matplotlib as mpl
from matplotlib import pyplot as plt
from plots import ASSETS, COLOURS, MARKERS, RESULTS, STYLE

PANELS = {
    "clip-224": "CLIP ViT-B/16, 224 px",
    "s14-518": "ViT-S/14, 518 px",
}
# what a line of each kind contains, the first that fits counts
KINDS = {
    "smaller image": ("resolution=",),
    "fewer layers": ("layers=",),
    "bfloat16, int8": ("dtype=", "quantize="),
    "both (hybrid)": ('"hybrid"',),
    "fewer keys": ('"connectivity"', '"topk"', '"local"', '"random"'),
    "fewer tokens": ('"token_drop"', '"token_merge"'),
    "other methods": ("",),
}
THEMES = {
    "light": {},
    "dark": {
        "text.color": "#e6e6e6", "axes.labelcolor": "#e6e6e6", "axes.edgecolor": "#9a9a9a",
        "xtick.color": "#cccccc", "ytick.color": "#cccccc", "grid.color": "#444444",
    },
}  # fmt: skip


class Point(NamedTuple):
    """One line on one model.

    Attributes:
        line: As typed.
        speed: Time of the dense model over the line's.
        loss: 1 minus the mean cosine of patch features.
    """

    line: str
    speed: float
    loss: float


def points(model: str) -> list[Point]:
    """All lines of the final, and those of the sweep that the final left out."""
    found: dict[str, Point] = {}
    for file in ("quality-sweep", "quality-final"):
        path = RESULTS / f"{file}.json"
        rows = json.loads(path.read_text()) if path.exists() else {"quality": [], "speed": []}
        kept = {r["line"]: r for r in rows["quality"] if r["model"] == model and "patches" in r}
        for row in rows["speed"]:
            if row["model"] == model and row["batch"] == 1 and row["line"] in kept:
                ratio = row["patched"]["ratio"]
                mean = kept[row["line"]]["patches"]["mean"]
                found[row["line"]] = Point(row["line"], ratio, 1 - mean)
    return sorted(found.values(), key=lambda point: point.speed)


def frontier(found: list[Point]) -> list[Point]:
    """Those that no other beats in both, by speed; only what is faster than dense."""
    best: list[Point] = []
    for point in sorted(found, key=lambda point: (-point.speed, point.loss)):
        if point.speed > 1 and (not best or point.loss < best[-1].loss):
            best.append(point)
    return best[::-1]


def kind(line: str) -> str:
    """What a line does."""
    return next(name for name, parts in KINDS.items() if any(part in line for part in parts))


def draw(axes: Any, title: str, found: list[Point]) -> None:
    for order, name in enumerate(KINDS):
        style = {"color": [*COLOURS, "#999999"][order], "marker": [*MARKERS, "x"][order]}
        own = [point for point in found if kind(point.line) == name]
        axes.scatter(
            [p.speed for p in own], [max(p.loss, 1e-4) for p in own], s=30, label=name, **style
        )
    best = frontier(found)
    axes.step(
        [p.speed for p in best],
        [max(p.loss, 1e-4) for p in best],
        where="pre",
        color="#888888",
        zorder=0,
    )
    axes.axvline(1, color="#888888", linewidth=1, linestyle=":")
    axes.set(xscale="log", yscale="log", title=title, xlabel="speed of the whole model (dense = 1)")
    axes.invert_yaxis()
    axes.set_xticks([0.5, 0.75, 1, 1.5, 2, 3, 4])
    axes.xaxis.set_major_formatter(mpl.ticker.FormatStrFormatter("%gx"))
    axes.xaxis.set_minor_locator(mpl.ticker.NullLocator())


def figure(theme: str) -> None:
    with mpl.rc_context({**STYLE, **THEMES[theme]}):
        drawing, panels = plt.subplots(1, len(PANELS), figsize=(11, 4.8))
        for axes, (model, title) in zip(panels, PANELS.items(), strict=True):
            draw(axes, title, points(model))
        panels[0].set_ylabel("features lost (1 - cosine), less is better")
        handles, labels = panels[0].get_legend_handles_labels()
        drawing.legend(handles, labels, loc="lower center", ncols=len(labels), fontsize=9)
        drawing.tight_layout(rect=(0, 0.07, 1, 1))
        path = ASSETS / f"quality-speed-{theme}.svg"
        drawing.savefig(path, metadata={"Date": None}, transparent=True)
        plt.close(drawing)


if __name__ == "__main__":
    for name in THEMES:
        figure(name)
