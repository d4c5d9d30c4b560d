"""Checks that the user's tiles, blocks and summary keys fit the grids of the model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from sparsiattn.attention.geometry import Grid, Sides
from sparsiattn.attention.site import Site
from sparsiattn.errors import InvalidOption
from sparsiattn.strategies.base import Strategy


def check_grids(configs: Mapping[Site, Strategy]) -> None:
    """Check the options of all sites against their grids at patch time.

    Only values that the user set are refused. Later, smaller images and shorter sequences reduce
    values that are too large for them, and so does a site that is too small for a default.

    Args:
        configs: The strategy of every selected site.

    Raises:
        InvalidOption: A site has fewer rows or columns than ``background``, or no site is as large
            as a ``tile`` or ``block``.
    """
    placed = {site: config for site, config in configs.items() if site.placed}
    for site, config in placed.items():
        _check_background(site, config)
    for name, grids in (
        ("tile", {site: _views_and_sides(site.grid, site) for site in placed}),
        ("block", {site: _views_and_sides(site.key_grid, site) for site in placed}),
    ):
        asked = {getattr(config, name) for config in placed.values()}
        for sides in sorted(side for side in asked if isinstance(side, tuple)):
            _check_sides(name, sides, grids.values())


def _views_and_sides(grid: Grid, site: Site) -> tuple[int, int, int]:
    """Number of the site's images or frames, and the rows and columns of one of them."""
    rows, columns = grid
    fits = rows % site.views == 0
    return (site.views, rows // site.views, columns) if fits else (1, rows, columns)


def _check_background(site: Site, config: Strategy) -> None:
    g, (rows, columns) = config.background, _views_and_sides(site.key_grid, site)[1:]
    default = type(config).__dataclass_fields__["background"].default
    if not isinstance(g, int) or g == default or not rows * columns:
        return
    largest = min(rows, columns) if rows > 1 else math.isqrt(columns)
    if g > largest:
        raise InvalidOption(
            f"background={g} does not fit site {site.name!r}, whose keys are {rows} x {columns} "
            f"patches: use at most background={largest}, or background='auto', which fits every "
            "site"
        )


def _check_sides(name: str, sides: Sides, grids: Iterable[tuple[int, int, int]]) -> None:
    if any(_fits(sides, grid) for grid in grids):
        return
    largest: Sides = max(grids, key=math.prod)[-len(sides) :]
    raise InvalidOption(
        f"no site of this model has a grid for {name}={sides}: the largest is "
        f"{' x '.join(map(str, largest))} patches; use at most {name}={largest}, or {name}='auto'"
    )


def _fits(sides: Sides, grid: tuple[int, int, int]) -> bool:
    """Whether a tile lies within a grid; in a single row it is a run of tokens."""
    if grid[:2] == (1, 1):
        return math.prod(sides) <= grid[2]
    wanted = sides if len(sides) == 3 else (1, *sides)
    return all(side <= most for side, most in zip(wanted, grid, strict=True))
