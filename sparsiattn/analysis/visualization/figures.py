"""Pictures of an `AttentionRecord`, drawn with matplotlib (the ``viz`` extra)."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

from sparsiattn.analysis.visualization import paint
from sparsiattn.analysis.visualization.paint import Array
from sparsiattn.analysis.visualization.result import AttentionRecord, Point, SiteAttention
from sparsiattn.errors import InvalidOption, unknown

T = TypeVar("T")
Cell = tuple[str, SiteAttention, Sequence[Array]]
"""A title, a site, and the exact attention and the pattern's attention of one of its queries."""

QUERY = "#22b8ff"
SMALL, LARGE = 8.5, 11
MOST = 24  # largest number of layers or heads in a picture; of more, evenly spaced ones are drawn

_SCALE = (
    "Brightness: square root of attention, each pair to its own maximum. Blue square: the query."
)


def check_view(view: str) -> None:
    """Refuse a name that is none of `VIEWS`."""
    if view not in VIEWS:
        raise unknown("view", view, VIEWS)


def draw(record: AttentionRecord, view: str, site: str | int | None = None) -> Any:
    """Draw one of `VIEWS` as a matplotlib figure.

    Args:
        record: The result of `show`.
        view: Name of the view.
        site: Name or index of a site; None for the middle one of the sites with a picture.

    Raises:
        UnknownName: There is no such view or site.
        InvalidOption: There is nothing to draw in this view, or matplotlib is not installed.
    """
    check_view(view)
    if view == "overview" and record.tokens and all(site.dense for site in record.sites):
        view = "tokens"  # there is no pattern to compare with
    if site is not None:
        return VIEWS[view](record, record[site])
    sites = [site for site in record.sites if site.grid is not None] or list(record.sites)
    return VIEWS[view](record, sites[len(sites) // 2])


def _titled(width: float, height: float, title: str, note: str) -> Any:
    """An empty figure with its title, and a note below it that explains the figure."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InvalidOption(
            "pictures need matplotlib, which is not installed: pip install 'sparsiattn[viz]' (or "
            "save an .html page, which does not need it)"
        ) from error
    lines = textwrap.wrap(note, int(15 * width))
    figure = Figure(figsize=(width, height), layout="constrained")
    # constrained layout reserves space for the title only, so the title includes the note's lines
    space = "\n" * len(lines)
    figure.suptitle(f"{title}{space}", fontsize=LARGE + 1, x=0.01, ha="left", weight="bold")
    text = "\n".join(lines)
    figure.text(0.01, 1 - 0.36 / height, text, fontsize=SMALL, color="#555555", va="top")
    return figure


def _overview(record: AttentionRecord, site: SiteAttention) -> Any:
    points = _points_left(record, site)
    note = (
        f"{site.name}, mean of {len(site.heads)} heads. Bright: high attention (square-root scale "
        "for each row). Blue square: the query."
    )
    titles = ["photo", "exact attention", "attention of the pattern", "keys kept"]
    titles = titles[: 2 if site.dense else 4]
    with_matrix = any(not site.dense for site in record.sites)
    width = 2.25 * len(titles) + (2.6 if with_matrix else 0.0)
    figure = left = _titled(width, 0.9 + 2.45 * len(points), record.title, note)
    if with_matrix:
        left, right = figure.subfigures(1, 2, width_ratios=(width - 2.6, 2.6))
        _matrix(right.subplots(), record, "mass", "exact attention kept, %")
    axes = _bare_axes(left, len(points), len(titles))
    for axis, text in zip(axes[0], titles, strict=True):
        axis.set_title(text, fontsize=LARGE)
    for row, point in zip(axes, points, strict=True):
        _compare(row, record, site, point)
    return figure


def _compare(
    axes: Sequence[Any], record: AttentionRecord, site: SiteAttention, point: Point
) -> None:
    """Draw one query: the photo, exact attention, the pattern's attention, and the kept keys."""
    patch = point.on(site.grid or (1, 1))
    exact, pattern = (values.mean(0) for values in _attention(site, point))
    share = site.keys_kept(*patch).float().mean(0).numpy()
    top = max(float(exact.max()), float(pattern.max()))
    pixels = record.pixels.numpy()
    pictures = [
        paint.enlarged(pixels),
        paint.heat(pixels, exact, top),
        paint.heat(pixels, pattern, top),
        paint.spotlight(pixels, share),
    ]
    for axis, picture in zip(axes, pictures, strict=False):
        _show_query(axis, picture, site, point)
    axes[-1].set_xlabel(_caption(site, site.query(*patch)), fontsize=SMALL)


def _attention(site: SiteAttention, point: Point) -> list[Array]:
    """Exact attention and the pattern's attention at a point, ``[H, rows, columns]`` each."""
    row, column = point.on(site.grid or (1, 1))
    return [site.attention(row, column, of).numpy() for of in ("exact", "pattern")]


def _caption(site: SiteAttention, query: int | None) -> str:
    """A caption with the keys that the pattern keeps for one query."""
    if query is None:
        return "dropped earlier"
    if site.dense:
        return f"all of {site.keys} keys"
    mass = float((site.exact[:, query] * site.kept[:, query]).sum(-1).mean())
    keys = float(site.kept[:, query].float().sum(-1).mean())
    return f"{keys:.0f} of {site.keys} keys, {100 * mass:.0f} % of the attention"


def _points_left(record: AttentionRecord, site: SiteAttention) -> Sequence[Point]:
    """The points whose patch still has a token at this site; the first point if there are none."""
    if site.grid is None:
        raise InvalidOption(f"{site.name} has no picture: {site.why}; try view='density'")
    grid = site.grid
    remaining = [point for point in record.points if site.query(*point.on(grid)) is not None]
    return remaining or record.points[:1]


def _layers(record: AttentionRecord, site: SiteAttention) -> Any:
    sites = [site for site in record.sites if site.grid is not None]
    if not sites:
        raise InvalidOption(f"no site has a picture: {site.why}; try view='density'")
    cells = []
    for layer in _some(sites, MOST):
        pair = [values.mean(0) for values in _attention(layer, record.points[0])]
        title = f"{layer.name}\nkeeps {100 * float(layer.mass.mean()):.0f} %"
        cells.append((title, layer, pair))
    return _pairs(record, cells, "Mean of heads")


def _heads(record: AttentionRecord, site: SiteAttention) -> Any:
    pair = _attention(site, _points_left(record, site)[0])
    cells = []
    for place, head in _some(list(enumerate(site.heads)), MOST):
        title = f"head {head}\nkeeps {100 * float(site.mass[place]):.0f} %"
        cells.append((title, site, [values[place] for values in pair]))
    return _pairs(record, cells, site.name)


def _pairs(record: AttentionRecord, cells: Sequence[Cell], subject: str) -> Any:
    """Draw columns of two pictures: exact attention above the pattern's attention."""
    note = f"{subject}: exact attention above, the pattern's below. {_SCALE}"
    columns = min(6, len(cells))
    rows = math.ceil(len(cells) / columns)
    figure = _titled(max(5.5, 1.9 * columns), 0.8 + 4.3 * rows, record.title, note)
    axes = _bare_axes(figure, 2 * rows, columns).reshape(rows, 2, columns)
    pixels = record.pixels.numpy()
    for column, (title, site, pair) in zip(axes.swapaxes(1, 2).reshape(-1, 2), cells, strict=False):
        top = max(float(values.max()) for values in pair)
        for axis, values in zip(column, pair, strict=True):
            _show_query(axis, paint.heat(pixels, values, top), site, record.points[0])
        column[0].set_title(title, fontsize=SMALL)
    return figure


def _tokens(record: AttentionRecord, site: SiteAttention) -> Any:
    if not record.tokens:
        raise InvalidOption(
            "view='tokens' needs a token strategy (token_drop, token_merge, hybrid); this patch "
            "keeps every token"
        )
    counts = [None, *(block.count for block in record.tokens)]
    changed = [block for i, block in enumerate(record.tokens) if block.count != counts[i]]
    blocks = _some(changed, 7)
    columns = min(4, len(blocks) + 1)
    rows = math.ceil((len(blocks) + 1) / columns)
    note = (
        "Dark patches were dropped. Patches with the same tint were merged into one token, and "
        "have its mean colour."
    )
    figure = _titled(max(7.5, 2.6 * columns), 0.8 + 2.75 * rows, record.title, note)
    axes = _bare_axes(figure, rows, columns).flatten()
    pixels = record.pixels.numpy()
    axes[0].imshow(paint.enlarged(pixels), interpolation="nearest")
    axes[0].set_title(f"photo, {blocks[0].place.numel()} patches", fontsize=SMALL + 1)
    for axis, block in zip(axes[1:], blocks, strict=False):
        picture = paint.tokens(pixels, block.place.numpy(), block.fused)
        axis.imshow(picture, interpolation="nearest")
        unit = "tokens in the MLP" if block.mlp_only else "tokens left"
        axis.set_title(f"after {block.name}: {block.count} {unit}", fontsize=SMALL + 1)
    return figure


def _some(items: list[T], most: int) -> list[T]:
    """At most ``most`` evenly spaced items, including the first and the last.

    >>> _some([1, 2, 3, 4, 5], 3)
    [1, 3, 5]
    """
    if len(items) <= most:
        return items
    return [items[i] for i in np.linspace(0, len(items) - 1, most).round().astype(int)]


def _density(record: AttentionRecord, site: SiteAttention) -> Any:
    note = "By layer (down) and head (across), means over all patch queries."
    figure = _titled(9.0, max(3.2, 1.3 + 0.34 * len(record.sites)), record.title, note)
    left, right = figure.subplots(1, 2)
    _matrix(left, record, "density", "pairs kept, %")
    _matrix(right, record, "mass", "exact attention kept, %")
    return figure


def _matrix(axis: Any, record: AttentionRecord, name: str, title: str) -> None:
    """Draw a matrix of layers by heads, with the value in each cell if there is space."""
    heads = max(len(site.heads) for site in record.sites)
    values = np.full((len(record.sites), heads), np.nan)
    for row, site in enumerate(record.sites):
        values[row, : len(site.heads)] = 100 * getattr(site, name).numpy()
    axis.imshow(values, cmap="viridis", vmin=0, vmax=100, aspect="auto")
    axis.set_title(title, fontsize=LARGE - 1, loc="right")
    names = [site.name for site in record.sites]
    axis.set_yticks(range(len(names)), names, fontsize=SMALL - 1)
    ticks = range(0, heads, -(-heads // 12))
    axis.set_xticks(ticks, list(map(str, ticks)), fontsize=SMALL - 1)
    axis.set_xlabel("head", fontsize=SMALL)
    axis.tick_params(length=0)
    if heads > 16:
        return
    style = {"ha": "center", "va": "center", "fontsize": SMALL - 2}
    for (row, column), value in np.ndenumerate(values):
        if math.isfinite(value):
            colour = "black" if value > 60 else "white"
            axis.text(column, row, f"{value:.0f}", color=colour, **style)


def _bare_axes(figure: Any, rows: int, columns: int) -> Any:
    """Axes for pictures ``[rows, columns]``, without ticks and frames."""
    bare = {"xticks": [], "yticks": [], "frame_on": False}
    return figure.subplots(rows, columns, squeeze=False, subplot_kw=bare)


def _show_query(axis: Any, picture: Array, site: SiteAttention, point: Point) -> None:
    """Draw a picture and a square around the query's patch, visible on bright and dark pictures."""
    from matplotlib.patches import Rectangle

    axis.imshow(picture, interpolation="nearest")
    grid = site.grid or (1, 1)
    row, column = point.on(grid)
    height, width = picture.shape[0] / grid[0], picture.shape[1] / grid[1]
    corner = (column * width - 0.5, row * height - 0.5)
    for colour, line in (("black", 3.2), (QUERY, 1.8)):
        axis.add_patch(Rectangle(corner, width, height, fill=False, ec=colour, lw=line))


VIEWS: dict[str, Callable[[AttentionRecord, SiteAttention], Any]] = {
    "overview": _overview,
    "layers": _layers,
    "heads": _heads,
    "tokens": _tokens,
    "density": _density,
}
