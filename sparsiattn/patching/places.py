"""What a patch may do where it is not known where in the image the tokens are."""

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

_TYPE = "say what they are: patch(..., grid=(rows, columns), prefix=..., suffix=...)"


def fit_places(configs: dict[Site, Strategy]) -> dict[Site, Strategy]:
    """The strategies of sites, fit for what is known of their sequences.

    Args:
        configs: The strategy of every selected site.

    Returns:
        Where places are not known, strategies without tiles and summary keys.

    Raises:
        InvalidOption: A strategy cannot do without places.

    Warns:
        GuessedStructure: Some structure is a guess, and no strategy depends on it.
    """
    for site, config in configs.items():
        if not site.placed:
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
    """Check that a token strategy can serve these sequences of patches.

    Raises:
        InvalidOption: It needs to know more of their places, or takes special tokens at the two
            ends of a sequence only.
    """
    for site in sites:
        if not site.placed:
            _require_known(tokens, site)
        _check_suffix(tokens, site)


def _require_known(strategy: Config, site: Site) -> None:
    if strategy.needs_grid:  # type: ignore[attr-defined]
        raise InvalidOption(unknown_places(strategy, site))


def unknown_places(strategy: Config, site: Site) -> str:
    """What to say of a strategy that needs places, at a site where they are not known."""
    what = "may be no patches" if site.is_guess else "are of several views"
    what = what if site.raster else "are in no raster order"
    return (
        f"{strategy.name!r} needs to know where tokens are in the image, and those of site "
        f"{site.name!r} {what}: {site.structure}; {_TYPE}, or use an attention strategy that needs "
        "no places, e.g. 'topk'"
    )


def _guess(sites: list[Site]) -> str:
    return (
        f"which tokens of {sites[0].name!r} and {len(sites) - 1} other sites are patches, and "
        f"where, is a guess: {sites[0].structure}. Keys are chosen one by one there (tile=1, "
        f"background=None); {_TYPE}"
    )


def _check_suffix(tokens: TokenStrategy, site: Site) -> None:
    assert site.structure is not None
    if site.structure.specials:
        raise InvalidOption(
            f"{tokens.name!r} cannot make sequences shorter that have special tokens between "
            f"patches, as site {site.name!r} has: {site.structure}; use an attention strategy, "
            "e.g. 'connectivity'"
        )
    if site.suffix_tokens and tokens.is_ragged():
        raise InvalidOption(
            f"{tokens.name!r} with counts that adapt to the image cannot keep tokens behind "
            f"the patches, as site {site.name!r} has: {site.structure}; use a fixed budget"
        )
