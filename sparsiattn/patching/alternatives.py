"""What other options of a strategy, or another size of its image, are expected to bring."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from torch import nn

from sparsiattn.attention.auto_options import TILE_FROM, auto_options
from sparsiattn.attention.geometry import Grid, Tile
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
"""Rows and columns of a sequence in which a strategy should pay if it ever does."""
WINDOW_LINE = "sparsiattn.patch(model, 'token_drop', score='norm', skip='window', keep=0.25{})"
SMALL_TILE = (4, 4)
"""The tile to compare with where few tokens have none."""


def expected_at(runtime: SiteRuntime, site: Site, strategy: Strategy) -> float | None:
    """Expected speed of a site if it were another, or had another strategy.

    Returns:
        It, relative to dense attention; None where no kernel or planner takes that.
    """
    module = runtime.module
    try:
        planner = place_planner(lambda: strategy.planner(site), module, training=module.training)
        other = replace(
            runtime, site=site, strategy=strategy, planner=planner, choices=ChoiceCache()
        )
        return expect(other, None).choice.expected
    except Exception:  # a plug-in may know no other size or tile
        return None


def pays_if_larger(runtime: SiteRuntime) -> bool:
    """Whether a site, which sees the whole image, would be faster than dense with more pixels."""
    site = runtime.site
    if site.windows > 1 or site.halo or not site.placed or not site.of_image:
        return False
    count = site.prefix_tokens + LARGE_GRID[0] * LARGE_GRID[1]
    if site.tokens >= count or site.keys != site.tokens:
        return False
    large = replace(site, tokens=count, keys=count, grid=LARGE_GRID, key_grid=LARGE_GRID)
    return (expected_at(runtime, large, runtime.strategy) or 0.0) >= 1.0


def window_line(sites: Sequence[Site], model: nn.Module, size: Grid) -> str:
    """The call by which a model in windows gains time, ready to type; empty where none is known.

    Args:
        sites: All of its attention.
        model: The model.
        size: Rows and columns of its map of patches.
    """
    for site in sites:
        whole = stage_grid(site.windows * site.tokens, (size, size))
        cut = _cut_around(model, site.name)
        if cut is None or whole is None or cut.window[0] * cut.window[1] != site.tokens:
            return ""
    first = model.get_submodule(sites[0].name)
    # torchvision's attention cuts windows itself, and knows the mask of shifted ones alone
    return WINDOW_LINE.format(", layers=[0]" if hasattr(first, "shift_size") else "")


def _cut_around(model: nn.Module, site: str) -> WindowCut | None:
    """How the block around a site cuts its map, where one says so."""
    while "." in site:
        site = site.rpartition(".")[0]
        cut = WindowCut.of(model.get_submodule(site))
        if cut is not None:
            return cut
    return None


def in_windows(sites: Sequence[Site]) -> bool:
    """Whether all attention is in windows, the last of which may span the whole map."""
    largest = max((site.tokens for site in sites if site.windows > 1), default=0)
    return bool(sites) and all(site.tokens <= largest for site in sites)


def window_note(sites: Sequence[Site], speeds: Iterable[float], line: str) -> str:
    """What to say where attention in small windows is sparse and no site gains; else empty.

    Args:
        sites: Those with sparse attention.
        speeds: Of each, relative to dense attention.
        line: See `window_line`.
    """
    if not in_windows(sites) or any(speed >= 1 for speed in speeds):
        return ""
    counts = sorted({site.tokens for site in sites})
    tokens = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    note = f"windows of {tokens} tokens gain nothing from sparse attention"
    return f"{note}; what helps: {line}" if line else note


def tile_lines(
    sites: Iterable[tuple[SiteRuntime, Expected]], run: DryRun | None
) -> tuple[str, ...]:
    """One line for every choice of a tile: why it was chosen, and what another would bring."""
    lines: dict[object, str] = {}
    for runtime, expected in sites:
        if not isinstance(expected.pattern, KeyLists) or runtime.dense:
            continue
        site = site_at(runtime.site, run)
        tile = runtime.strategy.tile_for(runtime.site.tokens)
        choice = runtime.strategy.tile, tile, site.tokens
        if choice not in lines:
            lines[choice] = _tile_line(runtime, site, expected.choice.expected)
    return tuple(lines.values())


def _tile_line(runtime: SiteRuntime, site: Site, speed: float) -> str:
    strategy, image = runtime.strategy, runtime.site
    tile = strategy.tile_for(image.tokens)
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
    return (
        f"{head}; tile={other}, {_meaning(other)}, is expected to be {ratio / speed:.1f}x as fast"
    )


def _why(strategy: Strategy, site: Site) -> str:
    if not site.placed:
        return "where tokens are in the image is not known"
    if strategy.tile != "auto":
        return "as given"
    side = "fewer than" if site.tokens < TILE_FROM else "at least"
    return f"auto: {site.tokens:,} tokens, {side} {TILE_FROM:,}"


def _meaning(tile: Tile) -> str:
    if isinstance(tile, int):
        return "keys for every query"
    return f"one list for up to {tile[0] * tile[1]} queries"
