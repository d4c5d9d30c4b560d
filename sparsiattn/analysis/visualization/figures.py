"""Pictures of a `AttentionView`, drawn with matplotlib (the ``viz`` extra)."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from sparsiattn.analysis.visualization import paint
from sparsiattn.analysis.visualization.paint import Array
from sparsiattn.errors import InvalidOption

T = TypeVar("T")

if TYPE_CHECKING:
    from sparsiattn.analysis.visualization.result import (
        AttentionView,
        BlockTokens,
        Point,
        SiteShown,
    )

QUERY = "#22b8ff"
SMALL, LARGE = 8.5, 11
MOST = 24  # layers or heads in one picture; of more, some are taken at equal steps


def figure(shown: AttentionView, view: str, site: str | int | None = None) -> Any:
    """One of `VIEWS` as a matplotlib figure."""
    draw = {
        "overview": _overview, "layers": _layers, "heads": _heads, "tokens": _tokens,
        "density": _density,
    }  # fmt: skip
    if view == "overview" and shown.tokens and all(one.dense for one in shown.sites):
        view = "tokens"  # there is no pattern to compare with
    return draw[view](shown, _site(shown, site))


def write(drawn: Any, path: Path) -> None:
    drawn.savefig(path, dpi=120, facecolor="white")


def _site(shown: AttentionView, which: str | int | None) -> SiteShown:
    """The site asked for, or the middle one of those with a picture."""
    if which is not None:
        return shown[which]
    placed = [site for site in shown.sites if site.grid is not None] or list(shown.sites)
    return placed[len(placed) // 2]


def _blank(width: float, height: float, title: str, note: str) -> Any:
    """An empty figure with its title and a line below that says how to read it."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InvalidOption(
            "pictures need matplotlib, which is not here: pip install 'sparsiattn[viz]' (or save "
            "an .html page, which needs nothing)"
        ) from error
    lines = textwrap.wrap(note, int(15 * width))
    drawn = Figure(figsize=(width, height), layout="constrained")
    space = "\n" * len(lines)
    drawn.suptitle(f"{title}{space}", fontsize=LARGE + 1, x=0.01, ha="left", weight="bold")
    text = "\n".join(lines)
    drawn.text(0.01, 1 - 0.36 / height, text, fontsize=SMALL, color="#555555", va="top")
    return drawn


def _overview(shown: AttentionView, site: SiteShown) -> Any:
    points = _alive(shown, site)
    note = (
        f"{site.name}, mean of {len(site.heads)} heads. Bright: much attention (square-root scale, "
        "one for each row). Blue square: the query."
    )
    titles = ["photo", "exact attention", "what the pattern leaves", "keys kept"]
    titles = titles[: 2 if site.dense else 4]
    kept = any(not one.dense for one in shown.sites)
    width = 2.25 * len(titles) + (2.6 if kept else 0.0)
    drawn = _blank(width, 0.9 + 2.45 * len(points), shown.title, note)
    left, right = drawn.subfigures(1, 2, width_ratios=(width - 2.6, 2.6)) if kept else (drawn, None)
    axes = left.subplots(len(points), len(titles), squeeze=False)
    for axis, text in zip(axes[0], titles, strict=True):
        axis.set_title(text, fontsize=LARGE)
    for line, point in zip(axes, points, strict=True):
        _compare(line, shown, site, point)
    if right is not None:
        _matrix(right.subplots(), shown, "mass", "exact attention kept, %")
    return drawn


def _compare(line: Sequence[Any], shown: AttentionView, site: SiteShown, point: Point) -> None:
    """One query: the photo, exact attention, the pattern's, and the kept keys."""
    grid = site.grid
    assert grid is not None
    row, column = point.on(grid)
    exact = site.attention(row, column).mean(0).numpy()
    pattern = site.attention(row, column, "pattern").mean(0).numpy()
    share = site.keys_kept(row, column).float().mean(0).numpy()
    top = max(float(exact.max()), float(pattern.max()))
    pixels = shown.pixels.numpy()
    pictures = (
        paint.enlarged(pixels), paint.heat(pixels, exact, top), paint.heat(pixels, pattern, top),
        paint.spotlight(pixels, share),
    )  # fmt: skip
    for axis, picture in zip(line, pictures, strict=False):
        _place(axis, picture)
        _mark(axis, picture, grid, (row, column))
    line[-1].set_xlabel(_figures(site, site.query(row, column)), fontsize=SMALL)


def _figures(site: SiteShown, query: int | None) -> str:
    """What the pattern keeps for one query, in words."""
    if query is None:
        return "dropped before"
    if site.dense:
        return f"all of {site.keys} keys"
    kept = float((site.exact[:, query] * site.kept[:, query]).sum(-1).mean())
    keys = float(site.kept[:, query].float().sum(-1).mean())
    return f"{keys:.0f} of {site.keys} keys, {100 * kept:.0f} % of the attention"


def _alive(shown: AttentionView, site: SiteShown) -> list[Point]:
    """The points whose patch still has a token at this site; the first where none has."""
    if site.grid is None:
        raise InvalidOption(f"{site.name} has no picture: {site.why}; try view='density'")
    found = [point for point in shown.points if site.query(*point.on(site.grid)) is not None]
    return found or list(shown.points[:1])


def _layers(shown: AttentionView, site: SiteShown) -> Any:
    sites = [one for one in shown.sites if one.grid is not None]
    if not sites:
        raise InvalidOption(f"no site has a picture: {site.why}; try view='density'")
    note = f"Mean of heads: above exact attention, below the pattern's. {_SCALE}"
    cells = []
    for one in _some(sites, MOST):
        row, column = shown.points[0].on(one.grid or (1, 1))
        pair = [one.attention(row, column, of).mean(0).numpy() for of in ("exact", "pattern")]
        cells.append((f"{one.name}\nkeeps {100 * float(one.mass.mean()):.0f} %", one, pair))
    return _pairs(shown, cells, note)


def _heads(shown: AttentionView, site: SiteShown) -> Any:
    point = _alive(shown, site)[0]
    row, column = point.on(site.grid or (1, 1))
    pairs = [site.attention(row, column, of).numpy() for of in ("exact", "pattern")]
    cells = []
    for place, head in _some(list(enumerate(site.heads)), MOST):
        name = f"head {head}\nkeeps {100 * float(site.mass[place]):.0f} %"
        cells.append((name, site, [pairs[0][place], pairs[1][place]]))
    return _pairs(
        shown, cells, f"{site.name}: above exact attention, below the pattern's. {_SCALE}"
    )


_SCALE = (
    "Brightness: square root of attention, each pair to its own maximum. Blue square: the query."
)


def _pairs(shown: AttentionView, cells: list[tuple[str, SiteShown, list[Array]]], note: str) -> Any:
    """Columns of two pictures: exact attention, and below it the pattern's."""
    columns = min(6, len(cells))
    lines = math.ceil(len(cells) / columns)
    drawn = _blank(max(5.5, 1.9 * columns), 0.8 + 4.3 * lines, shown.title, note)
    axes = drawn.subplots(2 * lines, columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    pixels = shown.pixels.numpy()
    for number, (name, site, pair) in enumerate(cells):
        top = max(float(values.max()) for values in pair)
        for below, values in enumerate(pair):
            axis = axes[2 * (number // columns) + below, number % columns]
            picture = paint.heat(pixels, values, top)
            _place(axis, picture)
            assert site.grid is not None
            _mark(axis, picture, site.grid, shown.points[0].on(site.grid))
        axes[2 * (number // columns), number % columns].set_title(name, fontsize=SMALL)
    return drawn


def _tokens(shown: AttentionView, site: SiteShown) -> Any:
    if not shown.tokens:
        raise InvalidOption(
            "view='tokens' needs a token strategy (token_drop, token_merge, hybrid); this patch "
            "keeps every token"
        )
    steps = _changes(shown.tokens)
    columns = min(4, len(steps) + 1)
    lines = math.ceil((len(steps) + 1) / columns)
    note = (
        "Dark patches were dropped. Patches of one tint were merged into one token, and have the "
        "mean of their colours."
    )
    drawn = _blank(max(7.5, 2.6 * columns), 0.8 + 2.75 * lines, shown.title, note)
    axes = drawn.subplots(lines, columns, squeeze=False).flatten()
    for axis in axes:
        axis.set_axis_off()
    pixels = shown.pixels.numpy()
    _place(axes[0], paint.enlarged(pixels))
    axes[0].set_title(f"photo, {steps[0].place.numel()} patches", fontsize=SMALL + 1)
    for axis, step in zip(axes[1:], steps, strict=False):
        _place(axis, paint.tokens(pixels, step.place.numpy(), step.fused))
        what = "take the MLP" if step.mlp_only else "tokens left"
        axis.set_title(f"after {step.name}: {step.count} {what}", fontsize=SMALL + 1)
    return drawn


def _changes(tokens: Sequence[BlockTokens], most: int = 7) -> list[BlockTokens]:
    """The blocks after which there are fewer tokens than before, at most so many of them."""
    found = [one for i, one in enumerate(tokens) if not i or one.count != tokens[i - 1].count]
    return _some(found, most)


def _some(items: list[T], most: int) -> list[T]:
    """At most so many of them, first and last included, at equal steps.

    >>> _some([1, 2, 3, 4, 5], 3)
    [1, 3, 5]
    """
    if len(items) <= most:
        return items
    return [items[i] for i in np.linspace(0, len(items) - 1, most).round().astype(int)]


def _density(shown: AttentionView, site: SiteShown) -> Any:
    note = "By layer (down) and head (across), means over all patch queries."
    drawn = _blank(9.0, max(3.2, 1.3 + 0.34 * len(shown.sites)), shown.title, note)
    left, right = drawn.subplots(1, 2)
    _matrix(left, shown, "density", "pairs kept, %")
    _matrix(right, shown, "mass", "exact attention kept, %")
    return drawn


def _matrix(axis: Any, shown: AttentionView, name: str, title: str) -> None:
    """Layers by heads; the figure in each cell where there is room for it."""
    heads = max(len(site.heads) for site in shown.sites)
    values = np.full((len(shown.sites), heads), np.nan)
    for row, site in enumerate(shown.sites):
        values[row, : len(site.heads)] = 100 * getattr(site, name).numpy()
    axis.imshow(values, cmap="viridis", vmin=0, vmax=100, aspect="auto")
    axis.set_title(title, fontsize=LARGE - 1, loc="right")
    axis.set_yticks(
        range(len(shown.sites)), [site.name for site in shown.sites], fontsize=SMALL - 1
    )
    ticks = range(0, heads, -(-heads // 12))
    axis.set_xticks(ticks, [str(head) for head in ticks], fontsize=SMALL - 1)
    axis.set_xlabel("head", fontsize=SMALL)
    axis.tick_params(length=0)
    if heads > 16:
        return
    for (row, column), value in np.ndenumerate(values):
        if math.isfinite(value):
            colour = "black" if value > 60 else "white"
            text = f"{value:.0f}"
            axis.text(column, row, text, ha="center", va="center", fontsize=SMALL - 2, color=colour)


def _place(axis: Any, picture: Array) -> None:
    axis.imshow(picture, interpolation="nearest")
    axis.set_xticks([])
    axis.set_yticks([])
    for edge in axis.spines.values():
        edge.set_visible(False)


def _mark(axis: Any, picture: Array, grid: tuple[int, int], query: tuple[int, int]) -> None:
    """A square around the query's patch, seen on bright and on dark pictures."""
    from matplotlib.patches import Rectangle

    height, width = picture.shape[0] / grid[0], picture.shape[1] / grid[1]
    for colour, line in (("black", 3.2), (QUERY, 1.8)):
        corner = (query[1] * width - 0.5, query[0] * height - 0.5)
        axis.add_patch(
            Rectangle(corner, width, height, fill=False, edgecolor=colour, linewidth=line)
        )
