"""Which of a model's sites to patch."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase

from sparsiattn.attention.site import Site
from sparsiattn.errors import InvalidType, unknown

Sites = str | re.Pattern[str] | Iterable[str] | Callable[[Site], bool]


def select(sites: list[Site], wanted: Sites) -> list[Site]:
    """The sites that match a glob, a regular expression (searched), one of several globs, or a
    predicate. Matching nothing is an error that lists what there is; so is a glob in a list.

    >>> import torch
    >>> x = torch.zeros(1, 1, 4, 2)
    >>> sites = [Site.of(x, x, x, name=f"blocks.{i}.attn") for i in range(2)]
    >>> [site.name for site in select(sites, "blocks.1.*")]
    ['blocks.1.attn']
    """
    if isinstance(wanted, str):
        return _nonempty([s for s in sites if fnmatchcase(s.name, wanted)], wanted, sites)
    if isinstance(wanted, re.Pattern):
        return _nonempty([s for s in sites if wanted.search(s.name)], wanted.pattern, sites)
    if callable(wanted):
        return _nonempty([s for s in sites if wanted(s)], wanted, sites)
    try:
        globs: list[object] = list(wanted)
    except TypeError:
        globs = [wanted]
    if not globs or not all(isinstance(glob, str) for glob in globs):
        raise InvalidType(
            "sites must be a glob, a compiled regular expression, a list of globs or a function "
            f"of a Site, got {wanted!r}"
        )
    matched = {s.name for glob in globs for s in select(sites, str(glob))}
    return [s for s in sites if s.name in matched]


def named(wanted: Sites) -> frozenset[str]:
    """The names among what `select` was given."""
    if isinstance(wanted, str):
        return frozenset([wanted])
    return frozenset(wanted) if isinstance(wanted, (list, tuple, set, frozenset)) else frozenset()


def _nonempty(found: list[Site], wanted: object, sites: list[Site]) -> list[Site]:
    if not found:
        raise unknown("site", wanted, (site.name for site in sites))
    return found
