"""What `tune` found, in words: which kernel is fastest where, and from where on sparse pays."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from statistics import median
from typing import NamedTuple

from sparsiattn.analysis.benchmark.tuning_cases import Case, Failure, Measured
from sparsiattn.kernels.cost import DENSE, MASKED, PLANNING
from sparsiattn.patching.text import speed_text


class Best(NamedTuple):
    """The fastest way at one number of tokens.

    Attributes:
        tokens: Patches.
        kernel: Its name, or ``"dense"``.
        speed: Of the fastest kernel, planning paid, relative to dense attention.
    """

    tokens: int
    kernel: str
    speed: float


def verdict_of(rows: Sequence[Measured]) -> Iterator[str]:
    """Two lines for each data type."""
    for dtype in dict.fromkeys(row.dtype for row in rows):
        best = list(fastest(row for row in rows if row.dtype == dtype))
        if not best:
            yield f"{dtype}: no kernel was measured with its planning"
            continue
        yield f"fastest here, {dtype}: {_places(best)}"
        yield f"sparse attention pays {_pays(best)}"


def fastest(rows: Iterable[Measured]) -> Iterator[Best]:
    """The fastest way by number of tokens, fewest first: by the median over the cases there."""
    speeds: dict[int, dict[str, list[float]]] = {}
    for case, of_case in _by_case(rows).items():
        planning = of_case.get(PLANNING)
        if planning is None:
            continue
        found = speeds.setdefault(case.tokens, {})
        for name, row in of_case.items():
            if name not in (DENSE, MASKED, PLANNING):
                paid = 1 / (1 / row.ratio + 1 / planning.ratio)
                found.setdefault(name, []).append(paid)
    for tokens, found in sorted(speeds.items()):
        if found:
            name, speed = max(((n, median(s)) for n, s in found.items()), key=lambda pair: pair[1])
            yield Best(tokens, name if speed > 1 else DENSE, speed)


def _by_case(rows: Iterable[Measured]) -> dict[Case, dict[str, Measured]]:
    found: dict[Case, dict[str, Measured]] = {}
    for row in rows:
        found.setdefault(row.case, {})[row.kernel] = row
    return found


def _places(best: Sequence[Best]) -> str:
    """As in "dense at 196 tokens, native at 576 to 4,096"."""
    parts = []
    for kernel, group in groupby(best, key=lambda b: b.kernel):
        tokens = [b.tokens for b in group]
        ends = f"{tokens[0]:,}" if len(tokens) == 1 else f"{tokens[0]:,} to {tokens[-1]:,}"
        parts.append(f"{kernel} at {ends} tokens")
    return ", ".join(parts)


def _pays(best: Sequence[Best]) -> str:
    """From the fewest tokens on where nothing measured above is slower than dense attention."""
    paying: list[Best] = []
    for one in reversed(best):
        if one.speed <= 1:
            break
        paying.insert(0, one)
    if not paying:
        top = max(best, key=lambda b: b.speed)
        at = f"{speed_text(top.speed)} at {top.tokens:,}"
        return f"at no size that was tried ({at} tokens at best): carry fewer tokens instead"
    speeds = ", ".join(f"{speed_text(b.speed)} at {b.tokens:,}" for b in _ends(paying))
    return f"from {paying[0].tokens:,} tokens on, planning included ({speeds})"


def _ends(paying: Sequence[Best]) -> Sequence[Best]:
    return paying if len(paying) == 1 else (paying[0], paying[-1])


def failure_line(failure: Failure) -> str:
    """What raised, where, and what follows."""
    where = f"{failure.dtype}, {failure.case.tokens:,} tokens"
    line = f"failed: {failure.kernel} ({where}): {failure.error}"
    if failure.kernel in (DENSE, MASKED, PLANNING):
        return line
    larger = " from that size on" if failure.pairs else ""
    return f"{line}; kernel='auto' does not take it here{larger}"
