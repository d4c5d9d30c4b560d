"""`SiteReport`: what a patch does at one site."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sparsiattn.attention.key_lists import KeyLists
from sparsiattn.attention.pattern import Dense, Pattern
from sparsiattn.attention.site import Site
from sparsiattn.patching.dry_run import DryRun
from sparsiattn.patching.estimate import Expected, measured_speed, site_at
from sparsiattn.patching.text import speed_text
from sparsiattn.runtime.site_runtime import SiteRuntime


@dataclass(frozen=True)
class SiteReport:
    """One patched site, for one image.

    Attributes:
        name: Module path.
        strategy: Name of its strategy.
        k: Its budget; None for strategies without one.
        tile: Queries that share their keys, as (rows, columns) or 1.
        kernel: Name of the kernel; ``"dense"`` for the host's own attention.
        density: Share of (query, key) pairs that are kept, without summary keys; None if it
            depends on the input.
        macs_dense: MACs of QK^T and AV of dense attention, with the tokens of the unpatched model.
        macs: MACs of QK^T and AV as patched; None if they depend on the input.
        predictor_macs: MACs of planning.
        expected: Expected speed relative to dense attention, planning included.
        ran: Whether the site has run since it was patched.
        tokens: Number of queries that reach it.
        note: What is unusual about it, in words; empty if nothing is.
        refusals: Name of every kernel that refused, with its reasons.
        planning: Expected time of planning, divided by that of dense attention.
        measured: The same as ``expected``, measured by `measure_sites` or by a `tune` that covers
            the shape; None if it was not measured.
    """

    name: str
    strategy: str
    k: int | float | None
    tile: Any
    kernel: str
    density: float | None
    macs_dense: int
    macs: int | None
    predictor_macs: int
    expected: float
    ran: bool
    tokens: int = 0
    note: str = ""
    refusals: tuple[tuple[str, tuple[str, ...]], ...] = ()
    planning: float = 0.0
    measured: float | None = None

    @property
    def speed(self) -> float:
        """The best known speed relative to dense attention: measured, else expected."""
        return self.expected if self.measured is None else self.measured


def site_report(runtime: SiteRuntime, expected: Expected, run: DryRun | None) -> SiteReport:
    site, strategy = site_at(runtime.site, run), runtime.strategy
    pattern, choice = expected.pattern, expected.choice
    dense = runtime.dense or isinstance(pattern, Dense)
    if not dense and runtime.last_choice is not None:
        choice = runtime.last_choice.after(expected.planning)
    k = getattr(strategy, "k", None)
    return SiteReport(
        name=site.name,
        strategy=strategy.name,
        k=k if isinstance(k, (int, float)) else None,
        tile=strategy.tile_sides(runtime.site.tokens),
        kernel="dense" if dense else choice.kernel.name,
        density=1.0 if dense else _density(pattern),
        macs_dense=runtime.site.macs,
        macs=site.macs if dense else _macs(site, pattern),
        # calls that share their keys plan once
        predictor_macs=0 if dense else round(expected.macs * (1 if site.shared else _calls(site))),
        expected=1.0 if dense else choice.expected,
        ran=runtime.last_choice is not None,
        tokens=site.tokens,
        note=_note(runtime, site, expected),
        refusals=choice.refusals,
        planning=0.0 if dense else choice.planning,
        measured=None if dense else measured_speed(runtime, site, choice),
    )


def _note(runtime: SiteRuntime, site: Site, expected: Expected) -> str:
    """What is unusual about a site, in words; empty if nothing is."""
    strategy, pattern, choice = runtime.strategy, expected.pattern, expected.choice
    dense, k = isinstance(pattern, Dense), getattr(strategy, "k", None)
    if isinstance(k, int) and k > site.keys:
        return f"k={k} exceeds the {site.keys} keys, so all are kept"
    if runtime.dense and not dense:
        when = " (decided on another machine or before tuning)" if choice.pays else ""
        speed = f"{choice.kernel.name} with planning would run at {speed_text(choice.expected)}"
        too_small = choice.expected >= 1 and not choice.pays
        overhead = ", which saves less time than Python takes there" if too_small else ""
        return f"left dense{when}: {speed} of dense{overhead}"
    if dense:
        if not strategy.selects_keys:
            return "runs the model's own attention"
        return "the budget keeps every key: dense" if strategy.name != "dense" else ""
    if strategy.prefix_keys and pattern_keys(pattern) <= site.prefix_tokens > 0:
        return f"prefix tokens use up the budget of {pattern_keys(pattern)} keys"
    return ""


def pattern_keys(pattern: Pattern) -> float:
    """Number of keys per patch query of a list pattern; infinity for other patterns."""
    return pattern.width if isinstance(pattern, KeyLists) else float("inf")


def _density(pattern: Pattern) -> float | None:
    pairs = pattern.pairs()
    if pairs is None:
        return None
    return (pairs - summary_pairs(pattern)) / (pattern.n_queries * pattern.n_keys)


def summary_pairs(pattern: Pattern) -> int:
    """Number of a pattern's pairs whose key is a summary key."""
    if pattern.summary is None:
        return 0
    return (pattern.n_queries - getattr(pattern, "dense_rows", 0)) * pattern.summary.count


def _macs(site: Site, pattern: Pattern) -> int | None:
    per_head = pattern.macs(site.head_dim, site.value_dim)
    return None if per_head is None else round(per_head * site.heads * site.windows * _calls(site))


def _calls(site: Site) -> float:
    """Number of a site's calls; smaller images count in proportion to their pairs of tokens."""
    return sum((length / site.tokens) ** 2 for length in site.lengths) or site.calls
