"""Draws quality against speed from the study of ``python benchmarks/quality``.

``python benchmarks/quality_plots.py`` writes ``quality-speed-light.svg`` and ``-dark.svg`` into
``docs/assets``: a panel for each model, a point for each line, and the frontier, which is made of
the lines that no other beats in both.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import matplotlib as mpl
from matplotlib import pyplot as plt
from plots import ASSETS, COLOURS, MARKERS, STYLE, THEMES
from quality_tables import frontier, measured

PANELS = {
    "clip-224": "CLIP ViT-B/16, 224 px",
    "clip-384": "CLIP ViT-B/16, 384 px",
    "s14-224": "ViT-S/14, 224 px",
    "s14-518": "ViT-S/14, 518 px",
    "s14-1036": "ViT-S/14, 1036 px",
}
ROWS, COLUMNS = 2, 3
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
# what the axes show: slower lines are on the page alone; a loss, at least
SLOWEST, FASTEST, LEAST = 0.85, 12.0, 1e-4
LABELS = {
    "clip-224": {
        'strategy="connectivity", k=0.25': "connectivity k=.25",
        'strategy="token_drop", keep=0.8': "drop keep=.8",
        'strategy="hybrid", k=0.25, keep=0.7': "hybrid k=.25 keep=.7",
        "resolution=0.75": "image 0.75",
        "resolution=0.5": "image 0.5",
    },
    "clip-384": {
        'strategy="connectivity", k=0.1': "connectivity k=.1",
        'strategy="token_drop", keep=0.8': "drop keep=.8",
        'strategy="diffrate"': "diffrate",
        "resolution=0.75": "image 0.75",
        "resolution=0.5": "image 0.5",
    },
    "s14-224": {
        'strategy="connectivity", k=0.1': "connectivity k=.1",
        'strategy="token_merge"': "merge .95 (default)",
        'strategy="token_merge", ratio=0.9': "merge .9",
        "resolution=0.8125": "image .8125",
        "resolution=0.5": "image .5",
    },
    "s14-518": {
        'strategy="token_merge", ratio=0.975': "merge .975",
        'strategy="connectivity", k=0.1': "connectivity k=.1",
        'strategy="token_merge"': "merge .95 (default)",
        'strategy="token_merge", ratio=0.85': "merge .85",
        "resolution=0.875": "image .875",
        "resolution=0.625": "image .625",
    },
    "s14-1036": {
        'strategy="token_merge", ratio=0.975': "merge .975",
        'strategy="connectivity", k=0.25': "connectivity k=.25",
        'strategy="token_merge"': "merge .95 (default)",
        'strategy="token_merge", ratio=0.85': "merge .85",
        "resolution=0.875": "image .875",
        "resolution=0.5": "image .5",
    },
}


class Point(NamedTuple):
    """One line on one model.

    Attributes:
        line: As typed.
        speed: Time of the dense model over the line's.
        loss: 1 minus the mean cosine of features: of the class token of CLIP, of patches else.
    """

    line: str
    speed: float
    loss: float


def points(model: str) -> list[Point]:
    """All lines of the study, by speed."""
    return [Point(row.line, row.ratio, 1 - row.cosine) for row in measured(model)]


def kind(line: str) -> str:
    """What a line does."""
    return next(name for name, parts in KINDS.items() if any(part in line for part in parts))


def draw(axes: Any, model: str, title: str) -> None:
    found = points(model)
    for order, name in enumerate(KINDS):
        style = {"color": [*COLOURS, "#999999"][order], "marker": [*MARKERS, "x"][order]}
        own = [point for point in found if kind(point.line) == name]
        axes.scatter(
            [p.speed for p in own], [max(p.loss, LEAST) for p in own], s=30, label=name, **style
        )
    best = [Point(r.line, r.ratio, 1 - r.cosine) for r in frontier(measured(model))]
    shown = [point for point in best if point.speed < FASTEST]
    losses = [max(point.loss, LEAST) for point in shown]
    axes.plot([point.speed for point in shown], losses, color="#888888", linewidth=1.5, zorder=0)
    axes.axvline(1, color="#888888", linewidth=1, linestyle=":")
    axes.set(xscale="log", yscale="log", title=title, xlabel="speed of the whole model (dense = 1)")
    axes.set_xlim(SLOWEST, FASTEST)
    axes.set_ylim(1, LEAST / 1.5)
    axes.set_xticks([1, 1.5, 2, 3, 4, 6, 9])
    axes.xaxis.set_major_formatter(mpl.ticker.FormatStrFormatter("%gx"))
    axes.xaxis.set_minor_locator(mpl.ticker.NullLocator())
    for line, text in LABELS[model].items():
        point = next(point for point in found if point.line == line)
        place = point.speed * 1.04, max(point.loss, LEAST) / 1.12
        axes.text(*place, text, fontsize=8.5)


def figure(ending: str) -> None:
    with mpl.rc_context({**STYLE, **THEMES[ending]}):
        drawing, grid = plt.subplots(ROWS, COLUMNS, figsize=(12.5, 8.8))
        *panels, rest = grid.flat
        for axes, (model, title) in zip(panels, PANELS.items(), strict=True):
            draw(axes, model, title)
        for axes in grid[:, 0]:
            axes.set_ylabel("features lost (1 - cosine), less is better")
        rest.axis("off")
        rest.legend(*panels[0].get_legend_handles_labels(), loc="center", fontsize=11)
        drawing.tight_layout()
        path = ASSETS / f"quality-speed{ending or '-light'}.svg"
        drawing.savefig(path, metadata={"Date": None})
        plt.close(drawing)


if __name__ == "__main__":
    for name in THEMES:
        figure(name)
