"""What ``"auto"`` meant when a patch was saved, kept beside it: a later table may mean others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from sparsiattn.attention.site import Site
from sparsiattn.errors import MismatchedPatch
from sparsiattn.strategies.base import Strategy
from sparsiattn.strategies.config import Config
from sparsiattn.strategies.hybrid import Hybrid

Values = dict[str, Any]


def auto_values(strategy: Strategy, tokens: int, keys: int, grid: tuple[int, int]) -> Values:
    """Options of a strategy that are ``"auto"``, resolved for one site.

    Args:
        strategy: With the site's budget.
        tokens: Queries, prefix included.
        keys: Keys, prefix included.
        grid: Rows and columns of the patch keys.
    """
    values: Values = {
        "tile": strategy.tile_for(tokens),
        "block": strategy.block_for(keys),
        "background": strategy.background_for(grid),
    }
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in values.items()
        if getattr(strategy, name) == "auto"
    }


def of_site(strategy: Strategy, site: Site) -> Values:
    """As `auto_values`, at the shape that the site was patched for."""
    return auto_values(strategy, site.tokens, site.keys, site.key_grid)


def with_saved_values(strategy: Config, saved: Mapping[str, Mapping[str, Any]]) -> Config:
    """The strategy with options fixed that ``"auto"`` meant otherwise when it was saved.

    Args:
        strategy: As the file describes it.
        saved: What the file says of every site.

    Raises:
        MismatchedPatch: Sites had different values, which one option cannot express.
    """
    attention = strategy.attention if isinstance(strategy, Hybrid) else strategy
    if not isinstance(attention, Strategy):
        return strategy
    changed = [
        (name, option, site["auto"][option])
        for name, site in saved.items()
        for option, value in _here(attention, site).items()
        if site["auto"].get(option, value) != value
    ]
    if not changed:
        return strategy
    values: Values = {}
    for name, option, value in changed:
        if values.setdefault(option, value) != value:
            raise MismatchedPatch(
                f"{option}='auto' meant {value} at site {name!r} when the patch was saved, and "
                f"{values[option]} at another; this version has one value for both: patch the "
                f"model with {option}= set, then load the planners' weights"
            )
    fixed: Values = {o: tuple(v) if isinstance(v, list) else v for o, v in values.items()}
    if isinstance(strategy, Hybrid):
        both = {name: value for name, value in fixed.items() if name in Hybrid.option_names()}
        return replace(strategy, attention=replace(attention, **fixed), **both)
    return replace(attention, **fixed)


def _here(strategy: Strategy, site: Mapping[str, Any]) -> Values:
    """What ``"auto"`` means now at a saved site."""
    if "auto" not in site:  # files from before had one table only
        return {}
    rows, columns = site["grid"]
    k = site["k"]
    strategy = strategy if k is None else replace(strategy, k=k)  # type: ignore[call-arg]
    return auto_values(strategy, site["tokens"], site["keys"], (rows, columns))
