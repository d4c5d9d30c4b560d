"""Alternatives that reports suggest: other tiles, larger images, windows that skip blocks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

from torch import nn

from sparsiattn.attention.auto_options import TILE_FROM, auto_options
from sparsiattn.attention.geometry import Grid, Sides, Tile
from sparsiattn.attention.key_lists import KeyLists
from sparsiattn.attention.layout import stage_grid
from sparsiattn.attention.site import Site
from sparsiattn.attention.windows import WindowCut
from sparsiattn.kernels.choice_cache import ChoiceCache
from sparsiattn.patching.dry_run import DryRun
from sparsiattn.patching.estimate import Expected, expect, site_at
from sparsiattn.patching.place_planner import place_planner
from sparsiattn.patching.text import shape_text
from sparsiattn.runtime.measured_speed import predicts
from sparsiattn.runtime.site_runtime import SiteRuntime
from sparsiattn.strategies.base import Strategy
from sparsiattn.strategies.connectivity import Connectivity

LARGE_GRID = (48, 48)
"""A token grid so large that a strategy that ever saves time should save time there."""
WINDOW_LINE = "sparsiattn.patch(model, 'token_drop', score='norm', skip='window', keep=0.25{})"
SMALL_TILE = (4, 4)
"""The tile to compare with at sites of few tokens, which have none by default."""


def expected_at(runtime: SiteRuntime, site: Site, strategy: Strategy) -> float | None:
    """Expected speed of a site with another shape or another strategy.

    Args:
        runtime: The site as it is.
        site: The site with the shape to assume.
        strategy: The strategy to assume.

    Returns:
        Speed relative to dense attention; None if no kernel or planner supports it.
    """
    module = runtime.module
    try:
        planner = place_planner(lambda: strategy.planner(site), module, training=module.training)
        other = replace(
            runtime, site=site, strategy=strategy, planner=planner, choices=ChoiceCache()
        )
        return expect(other, None).choice.expected
    except Exception:  # a plug-in may not support another size or tile
        return None


def pays_if_larger(runtime: SiteRuntime) -> bool:
    """Whether a site that attends to the whole image would beat dense attention on larger ones."""
    site = runtime.site
    if site.windows > 1 or site.halo or site.views > 1 or not site.placed or not site.of_image:
        return False
    count = site.prefix_tokens + LARGE_GRID[0] * LARGE_GRID[1]
    if site.tokens >= count or site.keys != site.tokens:
        return False
    large = replace(site, tokens=count, keys=count, grid=LARGE_GRID, key_grid=LARGE_GRID)
    return (expected_at(runtime, large, runtime.strategy) or 0.0) >= 1.0


def window_line(sites: Sequence[Site], model: nn.Module, size: Grid) -> str:
    """A call of `patch` that makes a windowed model faster, ready to copy; empty if none is known.

    Args:
        sites: All sites of the model.
        model: The model.
        size: Rows and columns of its feature map of patches.
    """
    for site in sites:
        grid = stage_grid(site.windows * site.tokens, (size, size))
        cut = _cut_around(model, site.name)
        if cut is None or grid is None or cut.window[0] * cut.window[1] != site.tokens:
            return ""
    first = model.get_submodule(sites[0].name)
    # torchvision's attention cuts windows itself, and only it knows the mask of shifted ones
    return WINDOW_LINE.format(", layers=[0]" if hasattr(first, "shift_size") else "")


def _cut_around(model: nn.Module, site: str) -> WindowCut | None:
    """The windows of the block around a site; None if no block has the attributes."""
    while "." in site:
        site = site.rpartition(".")[0]
        cut = WindowCut.of(model.get_submodule(site))
        if cut is not None:
            return cut
    return None


def in_windows(sites: Sequence[Site]) -> bool:
    """Whether all attention is in windows; those of the last stage may span the whole map."""
    largest = max((site.tokens for site in sites if site.windows > 1), default=0)
    return bool(sites) and all(site.tokens <= largest for site in sites)


def window_note(sites: Sequence[Site], speeds: Iterable[float], line: str) -> str:
    """A note that sparse attention gains nothing in small windows; empty if it does not apply.

    Args:
        sites: The sites with sparse attention.
        speeds: Speed of each, relative to dense attention.
        line: The result of `window_line`.
    """
    if not in_windows(sites) or any(speed >= 1 for speed in speeds):
        return ""
    counts = sorted({site.tokens for site in sites})
    tokens = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    note = f"windows of {tokens} tokens gain nothing from sparse attention"
    return f"{note}; try {line}" if line else note


def tile_lines(
    sites: Iterable[tuple[SiteRuntime, Expected]], run: DryRun | None
) -> tuple[str, ...]:
    """One line for every tile in use: why it was chosen, and the expected speed of another."""
    lines: dict[object, str] = {}
    for runtime, expected in sites:
        if not isinstance(expected.pattern, KeyLists) or runtime.dense:
            continue
        site = site_at(runtime.site, run)
        tile = runtime.strategy.tile_sides(runtime.site.tokens)
        choice = runtime.strategy.tile, tile, site.tokens
        if choice not in lines:
            lines[choice] = _tile_line(runtime, site, expected.choice.expected)
    return tuple(lines.values())


def _tile_line(runtime: SiteRuntime, site: Site, speed: float) -> str:
    strategy, image = runtime.strategy, runtime.site
    tile = strategy.tile_sides(image.tokens)
    head = f"tile {shape_text(tile)} ({_why(strategy, image)}): {_meaning(tile)}"
    other: Tile = SMALL_TILE if tile == 1 else 1
    if tile == 1 and site.tokens >= TILE_FROM:
        other = auto_options(site.tokens).tile
    if not site.placed or strategy.uses_cross_layer_state or site != image:
        return head
    changed = replace(strategy, tile=other)
    if isinstance(changed, Connectivity) and predicts(runtime.planner):
        changed = replace(changed, scores="predictor")
    ratio = expected_at(runtime, site, changed)
    if not ratio or not speed:
        return head
    times = f"{ratio / speed:.1f}x"
    speed_text = "about" if times == "1.0x" else times
    return f"{head}; tile={other}, {_meaning(other)}, is expected to be {speed_text} as fast"


def _why(strategy: Strategy, site: Site) -> str:
    if not site.placed:
        return "token positions in the image are not known"
    if strategy.tile != "auto":
        return "set by the user"
    side = "fewer than" if site.tokens < TILE_FROM else "at least"
    return f"auto: {site.tokens:,} tokens, {side} {TILE_FROM:,}"


def _meaning(tile: int | Sides) -> str:
    if isinstance(tile, int):
        return "one key list per query"
    return f"one key list for up to {math.prod(tile)} queries"
