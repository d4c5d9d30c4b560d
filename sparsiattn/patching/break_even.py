"""The batch size from which on sparse attention beats dense attention, by prices.

Launches take the same time for any batch, everything else grows with it. On a GPU they decide
whether sparse attention pays: the saving must outlast them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from sparsiattn.kernels import cost
from sparsiattn.kernels.cost import CallShape
from sparsiattn.kernels.prices import DENSE, MASKED, PLANNING, Prices, Work
from sparsiattn.patching.estimate import Expected
from sparsiattn.runtime.site_runtime import SiteRuntime

MOST_IMAGES = 64
"""Larger batches are not suggested."""


def images_needed(expected: Expected) -> tuple[str, float] | None:
    """The kernel that beats dense attention at the fewest images, and their number.

    Args:
        expected: What is expected of a site for one image on a GPU.

    Returns:
        Both; less than one image if a part of one would do. None if no batch is large enough, or
        if no kernel counts its work.
    """
    call = expected.choice.call
    if call is None:
        return None
    needed = ((_needed(expected, call, name, work), name) for name, work in expected.works.items())
    images, name = min(needed, default=(math.inf, ""))
    return None if images == math.inf else (name, images)


def _needed(expected: Expected, call: CallShape, name: str, work: Work) -> float:
    """Number of images from which on one kernel beats dense attention."""
    dense = _seconds(cost.prices(MASKED if call.biased else DENSE, call), call.dense)
    kernel = _seconds(cost.prices(name, call), work)
    started, each = _planning(expected, call)
    saved = dense[1] - kernel[1] - each
    return max(0.0, started + kernel[0] - dense[0]) / saved if saved > 0 else math.inf


def _seconds(price: Prices, work: Work) -> tuple[float, float]:
    """Seconds of starting operations, and seconds that grow with the batch."""
    started = price.call * work.calls
    return started, price.of(work) - started


def _planning(expected: Expected, call: CallShape) -> tuple[float, float]:
    """As `_seconds`, for planning: images share what is read from a table."""
    work, price = expected.planning.at(call.batch), cost.prices(PLANNING, call)
    return _seconds(price, work) if work.macs else (price.of(work), 0.0)


def break_even_lines(sites: Iterable[tuple[SiteRuntime, Expected]]) -> tuple[str, ...]:
    """A line for each kind of site with sparse attention."""
    lines = (_line(runtime, expected) for runtime, expected in sites if not runtime.dense)
    return tuple(dict.fromkeys(filter(None, lines)))


def _line(runtime: SiteRuntime, expected: Expected) -> str:
    call, needed = expected.choice.call, images_needed(expected)
    if call is None or not expected.works:
        return ""
    budget = getattr(runtime.strategy, "k", None)
    setting = f"{'' if budget is None else f'k={budget}, '}{call.queries:,} tokens"
    if needed is None:
        return f"break-even at {setting}: no batch size; drop tokens, or use larger images"
    kernel, images = needed
    pairs = call.batch * call.heads * call.queries * call.keys
    count = max(1, math.ceil(images))
    return (
        f"break-even at {setting}: batch x heads x N^2 of {scientific(images * pairs)} with "
        f"{kernel}, {count} image{'s' if count > 1 else ''} at a time (1 has {scientific(pairs)})"
    )


def scientific(number: float) -> str:
    """A number with two digits and its power of ten.

    >>> scientific(4.234e8), scientific(0)
    ('4.2e8', '0.0e0')
    """
    digits, _, power = f"{number:.1e}".partition("e")
    return f"{digits}e{int(power)}"
