"""Budgets: how many keys or tokens a strategy keeps."""

from __future__ import annotations

import math

from sparsiattn.attention.geometry import Tiles
from sparsiattn.errors import InvalidOption, InvalidType

Budget = int | float


def check_budget(k: object, name: str = "k") -> Budget:
    """Check a budget and return it unchanged.

    Args:
        k: A share in (0, 1] as float, or a count >= 1 as int.
        name: Name of the option, for error messages.

    Raises:
        InvalidType: ``k`` is neither int nor float, or is a bool.
        InvalidOption: ``k`` is out of range, or NaN.

    >>> check_budget(0.1), check_budget(20)
    (0.1, 20)
    """
    requirement = f"{name} must be a float in (0, 1] (a share) or an int >= 1 (a count)"
    if isinstance(k, bool) or not isinstance(k, (int, float)):
        raise InvalidType(f"{requirement}, got {k!r} of type {type(k).__name__}")
    if not (k >= 1 if isinstance(k, int) else 0.0 < k <= 1.0):  # NaN compares false
        raise InvalidOption(f"{requirement}, got {k!r}")
    return k


def count_of(k: Budget, n: int) -> int:
    """Number of keys kept out of ``n``: ``ceil(k * n)`` for a share, ``min(k, n)`` for a count.

    >>> count_of(0.1, 197), count_of(20, 197), count_of(500, 197)
    (20, 20, 197)
    """
    return min(k, n) if isinstance(k, int) else max(1, min(n, math.ceil(k * n)))


def at_most(k: Budget, n: int, most: int | None) -> Budget:
    """The budget ``k``, or ``most`` where ``k`` keeps more than that out of ``n``.

    >>> at_most(0.25, 1000, 512), at_most(0.25, 4000, 512), at_most(0.25, 4000, None)
    (0.25, 512, 0.25)
    """
    return k if most is None or count_of(k, n) <= most else most


def blocks_within(k: Budget, n_keys: int, prefix: int, blocks: Tiles) -> int:
    """Number of blocks of patch keys that a list of ``count_of(k, n_keys)`` keys touches.

    The list starts with ``prefix`` leading keys. The result is 0 if these fill the list, or if the
    list holds every key.
    """
    keys = count_of(k, n_keys)
    if keys <= prefix or keys == n_keys:
        return 0
    return min(blocks.count, -(-(keys - prefix) // blocks.smallest))
