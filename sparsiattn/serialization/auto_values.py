"""Values of ``"auto"`` options when a patch was saved, as a later version may choose others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from sparsiattn.attention.geometry import infer_grid
from sparsiattn.attention.site import Site
from sparsiattn.errors import MismatchedPatch
from sparsiattn.strategies.base import Strategy
from sparsiattn.strategies.config import Config
from sparsiattn.strategies.hybrid import Hybrid

Values = dict[str, Any]


def auto_values(
    strategy: Strategy, tokens: int, keys: int, grid: tuple[int, int], views: int = 1
) -> Values:
    """Options of a strategy that are ``"auto"``, resolved for one site.

    Args:
        strategy: The strategy with the site's budget.
        tokens: Number of queries, prefix included.
        keys: Number of keys, prefix included.
        grid: Rows and columns of the patch keys.
        views: Number of images or frames in the grid.

    Returns:
        By name, the value of every option that is ``"auto"``.
    """
    values: Values = {
        "tile": strategy.tile_for(tokens),
        "block": strategy.block_for(keys),
        "background": strategy.background_for(grid, views),
    }
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in values.items()
        if getattr(strategy, name) == "auto"
    }


def of_site(strategy: Strategy, site: Site) -> Values:
    """As `auto_values`, for the shape that the site was patched for."""
    return auto_values(strategy, site.tokens, site.keys, site.key_grid, site.views)


def with_saved_values(strategy: Config, saved: Mapping[str, Mapping[str, Any]]) -> Config:
    """Fix the ``"auto"`` options of a strategy whose values have changed since it was saved.

    Args:
        strategy: The strategy in the file.
        saved: The entries of all sites in the file.

    Raises:
        MismatchedPatch: Sites had different values, which one option cannot express.
    """
    attention = strategy.attention if isinstance(strategy, Hybrid) else strategy
    if not isinstance(attention, Strategy):
        return strategy
    changed = [
        (name, option, value)
        for name, site in saved.items()
        for option, value in _values_then(attention, site).items()
        if _values_now(attention, site)[option] != value
    ]
    if not changed:
        return strategy
    values: Values = {}
    for name, option, value in changed:
        if values.setdefault(option, value) != value:
            raise MismatchedPatch(
                f"{option}='auto' was {value} at site {name!r} when the patch was saved, and "
                f"{values[option]} at another, but this version has one value for both: patch the "
                f"model with {option}= set, then load the planners' weights"
            )
    fixed: Values = {o: tuple(v) if isinstance(v, list) else v for o, v in values.items()}
    if isinstance(strategy, Hybrid):
        both = {name: value for name, value in fixed.items() if name in Hybrid.option_names()}
        return replace(strategy, attention=replace(attention, **fixed), **both)
    return replace(attention, **fixed)


def _values_then(strategy: Strategy, site: Mapping[str, Any]) -> Values:
    """The values of ``"auto"`` options at a site when it was saved."""
    if "auto" in site:
        return dict(site["auto"])
    values = {} if site["tokens"] < 1024 else _VALUES_OF_OLD_FILES
    return {name: value for name, value in values.items() if getattr(strategy, name) == "auto"}


_VALUES_OF_OLD_FILES: Values = {"tile": [8, 8], "background": 8}
"""Values for files without an "auto" entry, from 1,024 tokens on; below, they did not change."""


def _values_now(strategy: Strategy, site: Mapping[str, Any]) -> Values:
    """The values of ``"auto"`` options at a saved site in this version."""
    rows, columns = site.get("grid") or infer_grid(site["tokens"])
    keys, k = site.get("keys", site["tokens"]), site["k"]
    strategy = strategy if k is None else replace(strategy, k=k)  # type: ignore[call-arg]
    fixed = {name: getattr(strategy, name) for name in ("tile", "block", "background")}
    # an option that was "auto" may have been resolved when the strategy was built
    return fixed | auto_values(
        strategy, site["tokens"], keys, (rows, columns), site.get("views", 1)
    )
