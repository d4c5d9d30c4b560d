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


def images_needed(expected: Expected) -> float | None:
    """Number of images from which on a site is expected to beat dense attention.

    Args:
        expected: What is expected of the site for one image.

    Returns:
        The number, less than one if a part of an image would do; None if no batch is large enough,
        or if the kernel does not count its work.
    """
    call, work = expected.choice.call, expected.work
    if call is None or work is None:
        return None
    dense = _seconds(cost.prices(MASKED if call.biased else DENSE, call), call.dense)
    kernel = _seconds(cost.prices(expected.choice.kernel.name, call), work)
    started, each = _planning(expected, call)
    saved = dense[1] - kernel[1] - each
    return max(0.0, started + kernel[0] - dense[0]) / saved if saved > 0 else None


def _seconds(price: Prices, work: Work) -> tuple[float, float]:
    """Seconds of starting operations, and seconds that grow with the batch."""
    started = price.call * work.calls
    return started, price.of(work) - started


def _planning(expected: Expected, call: CallShape) -> tuple[float, float]:
    """As `_seconds`, for planning: images share what is read from a table."""
    work, price = expected.planning.at(call.batch), cost.prices(PLANNING, call)
    return _seconds(price, work) if work.macs else (price.of(work), 0.0)


def pairs_needed(expected: Expected) -> float | None:
    """Product of batch, heads, queries and keys at `images_needed`."""
    call, images = expected.choice.call, images_needed(expected)
    if call is None or images is None:
        return None
    return images * call.batch * call.heads * call.queries * call.keys


def break_even_lines(sites: Iterable[tuple[SiteRuntime, Expected]]) -> tuple[str, ...]:
    """A line for each kind of site with sparse attention."""
    lines = (_line(runtime, expected) for runtime, expected in sites if not runtime.dense)
    return tuple(dict.fromkeys(filter(None, lines)))


def _line(runtime: SiteRuntime, expected: Expected) -> str:
    call, kernel = expected.choice.call, expected.choice.kernel.name
    if call is None or expected.work is None:
        return ""
    images, pairs = images_needed(expected), pairs_needed(expected)
    budget = getattr(runtime.strategy, "k", None)
    setting = f"{kernel}{'' if budget is None else f' at k={budget}'}, {call.queries:,} tokens"
    if images is None or pairs is None:
        return f"break-even of {setting}: at no batch size; drop tokens, or use larger images"
    count = max(1, math.ceil(images))
    here = call.batch * call.heads * call.queries * call.keys
    batch = "1 image" if count == 1 else f"{count} images"
    return (
        f"break-even of {setting}: batch x heads x N^2 of {scientific(pairs)}, {batch} at a time "
        f"(1 image has {scientific(here)})"
    )


def scientific(number: float) -> str:
    """A number with two digits and its power of ten.

    >>> scientific(4.234e8), scientific(0)
    ('4.2e8', '0.0e0')
    """
    digits, _, power = f"{number:.1e}".partition("e")
    return f"{digits}e{int(power)}"
