"""The verdict of `tune`: the fastest kernel by size, and the sizes at which sparse pays."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from statistics import median
from typing import NamedTuple

from sparsiattn.analysis.benchmark.tuning_cases import Case, Failure, Measured
from sparsiattn.kernels.prices import DENSE, MASKED, PLANNING
from sparsiattn.patching.text import speed_text


class Best(NamedTuple):
    """The fastest kernel at one number of tokens.

    Attributes:
        tokens: Number of patches.
        kernel: Name of the kernel, or ``"dense"``.
        speed: Speed of the fastest kernel relative to dense attention, planning included.
    """

    tokens: int
    kernel: str
    speed: float


def verdict_of(rows: Sequence[Measured]) -> Iterator[str]:
    """Yield two lines for each data type."""
    for dtype in dict.fromkeys(row.dtype for row in rows):
        best = list(fastest(row for row in rows if row.dtype == dtype))
        if not best:
            yield f"{dtype}: no kernel was measured with its planning"
            continue
        yield f"fastest here, {dtype}: {_places(best)}"
        yield f"sparse attention pays {_pays(best)}"


def fastest(rows: Iterable[Measured]) -> Iterator[Best]:
    """Yield the fastest kernel by number of tokens, ascending: by the median over its cases."""
    speeds: dict[int, dict[str, list[float]]] = {}
    for case, of_case in _by_case(rows).items():
        planning = of_case.get(PLANNING)
        if planning is None:
            continue
        by_kernel = speeds.setdefault(case.tokens, {})
        for name, row in of_case.items():
            if name not in (DENSE, MASKED, PLANNING):
                with_planning = 1 / (1 / row.ratio + 1 / planning.ratio)
                by_kernel.setdefault(name, []).append(with_planning)
    for tokens, by_kernel in sorted(speeds.items()):
        if by_kernel:
            medians = ((n, median(s)) for n, s in by_kernel.items())
            name, speed = max(medians, key=lambda pair: pair[1])
            yield Best(tokens, name if speed > 1 else DENSE, speed)


def _by_case(rows: Iterable[Measured]) -> dict[Case, dict[str, Measured]]:
    cases: dict[Case, dict[str, Measured]] = {}
    for row in rows:
        cases.setdefault(row.case, {})[row.kernel] = row
    return cases


def _places(best: Sequence[Best]) -> str:
    """Kernels by tokens, as in "dense at 196 tokens, native at 576 to 4,096"."""
    parts = []
    for kernel, group in groupby(best, key=lambda b: b.kernel):
        tokens = [b.tokens for b in group]
        ends = f"{tokens[0]:,}" if len(tokens) == 1 else f"{tokens[0]:,} to {tokens[-1]:,}"
        parts.append(f"{kernel} at {ends} tokens")
    return ", ".join(parts)


def _pays(best: Sequence[Best]) -> str:
    """The number of tokens from which on sparse attention was faster at every measured size."""
    paying: list[Best] = []
    for entry in reversed(best):
        if entry.speed <= 1:
            break
        paying.insert(0, entry)
    if not paying:
        top = max(best, key=lambda b: b.speed)
        at = f"{speed_text(top.speed)} at {top.tokens:,}"
        return f"at no measured size (best: {at} tokens): use a token strategy instead"
    speeds = ", ".join(f"{speed_text(b.speed)} at {b.tokens:,}" for b in _ends(paying))
    return f"from {paying[0].tokens:,} tokens on, planning included ({speeds})"


def _ends(paying: Sequence[Best]) -> Sequence[Best]:
    return paying if len(paying) == 1 else (paying[0], paying[-1])


def failure_line(failure: Failure) -> str:
    """One line about a failure and its consequence."""
    where = f"{failure.dtype}, {failure.case.tokens:,} tokens"
    line = f"failed: {failure.kernel} ({where}): {failure.error}"
    if failure.kernel in (DENSE, MASKED, PLANNING):
        return line
    larger = " from that size on" if failure.pairs else ""
    return f"{line}; kernel='auto' does not use it here{larger}"
