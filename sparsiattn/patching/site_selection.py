"""Selects the sites of a model to patch."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from typing import cast

from sparsiattn.attention.site import Site
from sparsiattn.errors import InvalidOption, InvalidType, unknown
from sparsiattn.runtime.patch_state import PatchState
from sparsiattn.strategies.dense import DenseStrategy

Sites = str | re.Pattern[str] | Iterable[str] | Callable[[Site], bool]


def select(sites: list[Site], selection: Sites) -> list[Site]:
    """The sites that match a selection.

    Args:
        sites: All sites of the model.
        selection: A glob, a regular expression (searched), several globs, or a predicate.

    Raises:
        UnknownName: No site matches, or none matches one of several globs.
        InvalidType: ``selection`` is none of these.

    >>> import torch
    >>> x = torch.zeros(1, 1, 4, 2)
    >>> sites = [Site.of(x, x, x, name=f"blocks.{i}.attn") for i in range(2)]
    >>> [site.name for site in select(sites, "blocks.1.*")]
    ['blocks.1.attn']
    """
    if isinstance(selection, str):
        return _nonempty([s for s in sites if fnmatchcase(s.name, selection)], selection, sites)
    if isinstance(selection, re.Pattern):
        return _nonempty([s for s in sites if selection.search(s.name)], selection.pattern, sites)
    if callable(selection):
        return _nonempty([s for s in sites if selection(s)], selection, sites)
    try:
        globs: list[object] = list(selection)
    except TypeError:
        globs = [selection]
    if not globs or not all(isinstance(glob, str) for glob in globs):
        raise InvalidType(
            "sites must be a glob, a compiled regular expression, a list of globs or a function "
            f"of a Site, got {selection!r}"
        )
    matched = {s.name for glob in globs for s in select(sites, str(glob))}
    return [s for s in sites if s.name in matched]


def watchable(state: PatchState, selection: Sites | None) -> list[str]:
    """Names of the selected sites that drop some of their keys.

    Raises:
        InvalidOption: There is no such site.
    """
    sites = state.sites if selection is None else select(state.sites, selection)
    asked = {site.name for site in sites}
    names = [
        runtime.site.name
        for runtime in state.runtimes
        if runtime.site.name in asked
        and not runtime.dense
        and runtime.strategy.selects_keys
        and not isinstance(runtime.strategy, DenseStrategy)
    ]
    if not names:
        raise InvalidOption(
            f"monitor() needs sites that drop some of their keys, but {state.strategy.name!r} "
            f"drops none at {sorted(asked)}: they are dense (only_if_faster=True leaves slower "
            "sites dense), or their keys are computed"
        )
    return names


def named(selection: Sites) -> frozenset[str]:
    """The names or globs in a selection; empty if it is a predicate or regular expression."""
    if isinstance(selection, str):
        return frozenset([selection])
    listed = isinstance(selection, (list, tuple, set, frozenset))
    return frozenset(cast("Iterable[str]", selection)) if listed else frozenset()


def _nonempty(matching: list[Site], selection: object, sites: list[Site]) -> list[Site]:
    if not matching:
        raise unknown("site", selection, (site.name for site in sites))
    return matching
