"""What other options of a strategy, or another size of its image, are expected to bring."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from sparsiattn.attention.auto_options import TILE_FROM, auto_options
from sparsiattn.attention.geometry import Tile
from sparsiattn.attention.key_lists import KeyLists
from sparsiattn.attention.site import Site
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
