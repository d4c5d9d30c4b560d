"""Restricts strategies at sites whose token positions in the image are not known."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import replace

from sparsiattn.attention.site import Site
from sparsiattn.errors import GuessedStructure, InvalidOption
from sparsiattn.strategies.base import Strategy
from sparsiattn.strategies.config import Config
from sparsiattn.strategies.dense import DenseStrategy
from sparsiattn.strategies.token_base import TokenStrategy

_TYPE = "pass the layout, patch(..., grid=(rows, columns), prefix=..., suffix=...)"


def fit_places(configs: dict[Site, Strategy]) -> dict[Site, Strategy]:
    """Adapt the strategies of sites to what is known about their sequences.

    Args:
        configs: The strategy of every selected site.

    Returns:
        The strategies, without tiles and summary keys where token positions are not known.

    Raises:
        InvalidOption: A strategy needs token positions that are not known.

    Warns:
        GuessedStructure: The structure of a sequence is a guess, but no strategy depends on it.
    """
    for site, config in configs.items():
        if not site.placed or (site.has_views_apart and not config.supports_views):
            _require_known(config, site)
    choosing = (s for s, config in configs.items() if not isinstance(config, DenseStrategy))
    guesses = [site for site in choosing if site.is_guess]
    if guesses:
        warnings.warn(_guess(guesses), GuessedStructure, stacklevel=5)
    return {
        site: config if site.placed else replace(config, tile=1, background=None)
        for site, config in configs.items()
    }


def require_ends(tokens: TokenStrategy, sites: Iterable[Site]) -> None:
    """Check that a token strategy supports these sequences of patches.

    Raises:
        InvalidOption: It needs token positions that are not known, or special tokens are not at
            the ends of a sequence.
    """
    for site in sites:
        if not site.placed or site.packed:
            _require_known(tokens, site)
        _check_suffix(tokens, site)


def _require_known(strategy: Config, site: Site) -> None:
    if strategy.needs_grid:  # type: ignore[attr-defined]
        raise InvalidOption(unknown_places(strategy, site))


def unknown_places(strategy: Config, site: Site) -> str:
    """The error for a strategy that needs token positions at a site where they are not known."""
    problem = "may not be patches" if site.is_guess else "belong to several views"
    problem = problem if site.raster else "are not in raster order"
    problem = "have a grid of their own in every image" if site.packed else problem
    return (
        f"{strategy.name!r} needs to know where tokens are in the image, but those of site "
        f"{site.name!r} {problem}: {site.structure}; {_TYPE}, or use an attention strategy that "
        "needs no positions, e.g. 'topk'"
    )


def _guess(sites: list[Site]) -> str:
    return (
        f"which tokens of {sites[0].name!r} and {len(sites) - 1} other sites are patches, and "
        f"their positions, is a guess: {sites[0].structure}. Keys are chosen one by one there "
        f"(tile=1, background=None); {_TYPE}"
    )


def _check_suffix(tokens: TokenStrategy, site: Site) -> None:
    assert site.structure is not None
    if site.structure.specials:
        raise InvalidOption(
            f"{tokens.name!r} cannot shorten sequences with special tokens between patches, as at "
            f"site {site.name!r}: {site.structure}; use an attention strategy, e.g. 'connectivity'"
        )
    if site.suffix_tokens and tokens.is_ragged():
        raise InvalidOption(
            f"{tokens.name!r} with counts that adapt to the image does not support special tokens "
            f"after the patches, as at site {site.name!r}: {site.structure}; use a fixed budget"
        )
