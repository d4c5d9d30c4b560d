"""Draws the speed of attention from the JSON under ``results/`` to ``docs/assets/``:
``python benchmarks/plots.py`` (``--device cuda`` for the figures of a GPU), each picture for a
light page and, as ``NAME-dark``, for a dark one.

* ``speed-tokens-DEVICE.svg``: speed relative to dense attention against tokens, a line per budget;
* ``speed-density-DEVICE.svg``: the same against density, a line per number of tokens;
* ``roofline-DEVICE.svg``: attained GFLOP/s against arithmetic intensity.

It reads the rows of every ``results/kernels*-DEVICE.json`` that have these fields:

    tokens: patch tokens, a CLS token comes on top     heads, dim, batch: of the attention call
    k: budget, a share of the keys                     tile: queries that share a key list
    density: computed pairs over all pairs             kernel: its name ("gather" where missing)
    macs: {"dense", "sparse"}, QK^T and AV             bytes: {"dense", "sparse"}, operands, result
                                                       and what the kernel copies besides
    with_planning, kernel_only, planning: as `common.paired` returns them, first
    the sparse side (or planning alone), second dense attention: "ratio" with "ratio_quartiles",
    "first_ms", "second_ms"

and ``roof`` of the file: {"gflops", "gbytes"}, the machine's best matrix product and copy.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot as plt

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
ASSETS = ROOT / "docs" / "assets"
FIELDS = {"tokens", "heads", "dim", "k", "density", "tile", "batch", "macs", "bytes"}

# Okabe and Ito's colours, told apart with any kind of colour vision; markers repeat what they say
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00"]
MARKERS = ["o", "s", "^", "D", "v", "P"]
STYLE = {
    "svg.hashsalt": "sparsiattn", "svg.fonttype": "path", "font.size": 11, "axes.titlesize": 12,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "grid.color": "#e3e3e3", "grid.linewidth": 0.8, "axes.axisbelow": True, "lines.linewidth": 2,
    "lines.markersize": 7, "legend.frameon": False, "xtick.color": "#444444",
    "ytick.color": "#444444", "savefig.transparent": True,
}  # fmt: skip
THEMES = {
    "": {},
    "-dark": {
        "text.color": "#e6e6e6", "axes.labelcolor": "#e6e6e6", "axes.edgecolor": "#9a9a9a",
        "xtick.color": "#cccccc", "ytick.color": "#cccccc", "grid.color": "#444444",
    },
}  # fmt: skip
"""By the ending of the file's name."""

Row = dict[str, Any]


def read(device: str) -> tuple[list[Row], dict[str, float] | None, str]:
    """Rows that carry what is drawn, the machine's roof, and where they were measured."""
    rows, roof, cards = [], None, set()
    for path in sorted(RESULTS.glob(f"kernels*-{device}.json")):
        found = json.loads(path.read_text())
        fit = [row for row in found["speedup"] if set(row) >= FIELDS]
        if fit:
            rows += fit
            roof = found.get("roof", roof)
            card = found["machine"]
            where = card.get("gpu") if device == "cuda" else None
            cores = "1 thread" if card["threads"] == 1 else f"{card['threads']} threads"
            where = where or f"{card['processor']}, {cores}"
            cards.add(f"{where}, {found['dtype']}, torch {card['torch']}")
    return rows, roof, "; ".join(sorted(cards))


def muted() -> str:
    """The colour of what stands behind the data: baselines, notes, the names of both."""
    return str(mpl.rcParams["xtick.color"])


def draw(name: str, make: Callable[[], Any], folder: Path = ASSETS, kind: str = "svg") -> None:
    """Save a picture in both themes.

    Args:
        name: Of the file, without ending.
        make: Makes the figure in the style that is set.
        folder: Where the files go.
        kind: ``"svg"`` or ``"png"``.
    """
    # no date in the file: the same figures give the same bytes
    metadata = {"Date": None} if kind == "svg" else {}
    for ending, theme in THEMES.items():
        with mpl.rc_context({**STYLE, **theme}):
            figure = make()
            figure.savefig(folder / f"{name}{ending}.{kind}", dpi=110, metadata=metadata)
            plt.close(figure)


def by(rows: list[Row], name: str) -> dict[Any, list[Row]]:
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(row[name], []).append(row)
    return dict(sorted(groups.items()))


def usual(rows: list[Row]) -> list[Row]:
    """Of rows that differ in more than tokens and budget, those of the commonest kind."""
    kinds: dict[str, list[Row]] = {}
    for row in rows:
        kind = [row["tile"], row["heads"], row["dim"], row["batch"], row.get("kernel", "gather")]
        kinds.setdefault(json.dumps(kind), []).append(row)
    most = max(kinds.values(), key=len)
    unique = {(row["tokens"], row["k"]): row for row in most}
    return list(unique.values())


def shape_of(row: Row) -> str:
    tile = row["tile"]
    sides = f"{tile[0]} x {tile[1]}" if isinstance(tile, list) else str(tile)
    return f"batch {row['batch']}, {row['heads']} heads of {row['dim']}, {sides} query tiles"


def speed_lines(
    axes: Any, groups: dict[Any, list[Row]], x: str, label: Callable[[Any], str]
) -> None:
    """Planning paid as a full line with its quartiles, the kernel alone as a thin one."""
    for i, (name, rows) in enumerate(groups.items()):
        rows.sort(key=lambda row: row[x])
        at = [row[x] for row in rows]
        look: dict[str, Any] = {"color": COLOURS[i % 6], "marker": MARKERS[i % 6]}
        axes.plot(at, [r["with_planning"]["ratio"] for r in rows], label=label(name), **look)
        low, high = zip(*(r["with_planning"]["ratio_quartiles"] for r in rows), strict=True)
        axes.fill_between(at, low, high, color=COLOURS[i % 6], alpha=0.15, linewidth=0)
        alone = [r["kernel_only"]["ratio"] for r in rows]
        axes.plot(at, alone, color=COLOURS[i % 6], linewidth=1, linestyle=(0, (4, 3)))
    axes.axhline(1.0, color=muted(), linewidth=1)
    axes.annotate("dense", (0, 1), xycoords=("axes fraction", "data"), xytext=(4, -13),
                  textcoords="offset points", color=muted())  # fmt: skip
    axes.plot([], [], color=muted(), linewidth=1, linestyle=(0, (4, 3)), label="kernel alone")
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}x")
    axes.set_ylabel("speed relative to dense attention")
    axes.legend()


def speed_by_tokens(rows: list[Row], card: str) -> Any:
    figure, axes = plt.subplots(figsize=(7, 4.6), layout="constrained")
    speed_lines(axes, by(rows, "k"), "tokens", lambda k: f"k = {k:g}")
    axes.set_xscale("log", base=2)
    at = sorted({row["tokens"] for row in rows})
    axes.set_xticks(at, [f"{n:,}" for n in at])
    axes.minorticks_off()
    axes.set_xlabel("patch tokens")
    _title(axes, "Attention with planning paid, by sequence length", shape_of(rows[0]), card)
    return figure


def speed_by_density(rows: list[Row], card: str) -> Any:
    figure, axes = plt.subplots(figsize=(7, 4.6), layout="constrained")
    speed_lines(axes, by(rows, "tokens"), "density", lambda n: f"{n:,} tokens")
    axes.set_xlabel("density (computed pairs / all pairs)")
    axes.set_xlim(left=0)
    _title(axes, "Attention with planning paid, by density", shape_of(rows[0]), card)
    return figure


def roofline(rows: list[Row], roof: dict[str, float] | None, card: str) -> Any:
    """Attained GFLOP/s of dense attention and of the kernel alone, by FLOPs per byte moved."""
    figure, axes = plt.subplots(figsize=(7, 4.6), layout="constrained")
    intensity = [x for row in rows for x in (_intensity(row, "dense"), _intensity(row, "sparse"))]
    if roof is not None:
        ends = [min(intensity) / 2, max(intensity) * 2]
        knee = roof["gflops"] / roof["gbytes"]
        across = sorted({*ends, min(max(knee, ends[0]), ends[1])})
        limit = [min(roof["gflops"], roof["gbytes"] * x) for x in across]
        says = f"roof: {roof['gflops']:.0f} GFLOP/s, {roof['gbytes']:.0f} GB/s (measured)"
        axes.plot(across, limit, color=muted(), linewidth=1.5, label=says)
    for i, (n, group) in enumerate(by(rows, "tokens").items()):
        look: dict[str, Any] = {"color": COLOURS[i % 6], "marker": MARKERS[i % 6], "linestyle": ""}
        x = [_intensity(row, "sparse") for row in group]
        axes.plot(
            x, [_gflops(r, "sparse", "first_ms") for r in group], label=f"{n:,} tokens", **look
        )
        dense = [_gflops(row, "dense", "second_ms") for row in group]
        middle = sorted(dense)[len(dense) // 2]
        axes.plot([_intensity(group[0], "dense")], [middle], fillstyle="none", **look)
    axes.plot([], [], color=muted(), marker="o", fillstyle="none", linestyle="", label="dense")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("arithmetic intensity (FLOP per byte moved to and from memory)")
    axes.set_ylabel("attained GFLOP/s")
    axes.legend(loc="lower right", fontsize=9)
    _title(axes, "Roofline: gather (filled) and dense attention (hollow)", shape_of(rows[0]), card)
    return figure


def _intensity(row: Row, side: str) -> float:
    return float(2.0 * row["macs"][side] / row["bytes"][side])


def _gflops(row: Row, side: str, ms: str) -> float:
    return float(2e-6 * row["macs"][side] / row["kernel_only"][ms])


def _title(axes: Any, text: str, shape: str, card: str) -> None:
    axes.set_title(text, loc="left", fontweight="bold", pad=32)
    axes.text(0, 1.02, f"{shape}\n{card}", transform=axes.transAxes, fontsize=8, color=muted())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--format", default="svg", help="svg or png")
    parser.add_argument("--out", type=Path, default=ASSETS)
    options = parser.parse_args()
    rows, roof, card = read(options.device)
    if not rows:
        raise SystemExit(
            f"no results/kernels*-{options.device}.json has rows with {sorted(FIELDS)}: run "
            f"python benchmarks/kernels.py --sweep --device {options.device}"
        )
    mpl.use("Agg")
    options.out.mkdir(parents=True, exist_ok=True)
    drawn = usual(rows)
    figures = {
        "speed-tokens": lambda: speed_by_tokens(drawn, card),
        "speed-density": lambda: speed_by_density(drawn, card),
        "roofline": lambda: roofline(drawn, roof, card),
    }
    for name, make in figures.items():
        draw(f"{name}-{options.device}", make, options.out, options.format)
        print(f"wrote {name}-{options.device}")


if __name__ == "__main__":
    main()
