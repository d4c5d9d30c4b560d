"""`Report`: what a patch does (kernels, density, MACs before and after, what was skipped)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from sparsiattn.attention.key_lists import KeyLists
from sparsiattn.attention.pattern import Dense, Pattern
from sparsiattn.attention.site import Site
from sparsiattn.errors import ProbeFailed, renamed_property
from sparsiattn.kernels.native import build
from sparsiattn.patching.alternatives import tile_lines, window_line, window_note
from sparsiattn.patching.discovery.meta_model import MetaInputs, has_data, run_dry
from sparsiattn.patching.dry_run import DryRun, dry_copy, dry_inputs, dry_run
from sparsiattn.patching.estimate import Expected, expect_all, measured_speed, site_at
from sparsiattn.patching.flop_counter import mac_counter, macs_of
from sparsiattn.patching.model_speed import instead, model_speed, other_macs
from sparsiattn.patching.reduction_lines import reduction_lines
from sparsiattn.patching.report_lines import (
    SLOWER,
    loses_time,
    no_fast_kernel,
    not_faster,
    price_source,
    whole_model,
)
from sparsiattn.patching.text import (
    Row,
    aligned,
    macs_text,
    plain_data,
    shape_text,
    speed_text,
    structure_lines,
)
from sparsiattn.runtime.monitor import MonitorReport
from sparsiattn.runtime.patch_state import PatchState
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


@dataclass(frozen=True)
class Report:
    """Totals per image, and one `SiteReport` per site. ``print`` it, or call `to_dict`.

    FLOPs are twice the MACs. A value is None if it depends on the input.

    Attributes:
        model: Class of the model.
        backbone: Name of the backbone adapter.
        strategy: Name of the strategy.
        input_shape: Shape of one image.
        sites: The patched sites.
        not_selected: Names of sites that ``sites=`` excluded.
        skipped: ``(name, reason)`` of attention that cannot be patched.
        macs_dense: MACs of the unpatched model.
        mhsa_macs_dense: MACs of QK^T and AV of the unpatched model.
        mhsa_macs: MACs of QK^T and AV as patched.
        predictor_macs: MACs of planning.
        other_macs: MACs of everything except attention and planning.
        reductions: What token strategies do in each block, in words.
        price_source: Where the prices for expected speeds come from, in words.
        structures: How the tokens of sites map to the image, and who says so.
        whole_blocks: ``(name, reason)`` of blocks that keep every token under a token strategy:
            decoders, queries, text.
        speed: Expected speed of the whole model relative to dense: sites at their best known
            speed, the rest by its MACs.
        instead: Alternatives to try if ``speed`` is below 0.98.
        tiles: Which tiles are used, why, and the expected speed of another one.
        no_fast_kernel: A note that the model's device has no fast kernel; empty if it has one.
        native_faults: Why compiled code that came with the package does not run.
        windows: A note that attention in small windows gains nothing, with an alternative; else
            empty.
        monitor: The results of `Patch.monitor`; None if no monitor is active.

    >>> import sparsiattn
    >>> from sparsiattn.testing.hosts import tiny_vit
    >>> with sparsiattn.patch(tiny_vit(), "topk", k=0.25) as patch:
    ...     report = patch.report()
    >>> report.strategy, report.mhsa_macs < report.mhsa_macs_dense
    ('topk', True)
    """

    model: str
    backbone: str
    strategy: str
    input_shape: tuple[int, ...]
    sites: tuple[SiteReport, ...]
    not_selected: tuple[str, ...]
    skipped: tuple[tuple[str, str], ...]
    macs_dense: int
    mhsa_macs_dense: int
    mhsa_macs: int | None
    predictor_macs: int
    other_macs: int | None = None
    reductions: tuple[str, ...] = ()
    price_source: str = ""
    structures: tuple[str, ...] = ()
    whole_blocks: tuple[tuple[str, str], ...] = ()
    speed: float | None = None
    instead: tuple[str, ...] = ()
    tiles: tuple[str, ...] = ()
    no_fast_kernel: str = ""
    native_faults: tuple[str, ...] = ()
    windows: str = ""
    monitor: MonitorReport | None = None

    @property
    def macs(self) -> int | None:
        """MACs of the patched model."""
        if self.mhsa_macs is None or self.other_macs is None:
            return None
        return self.other_macs + self.mhsa_macs + self.predictor_macs

    left = renamed_property("left", "skipped")
    untouched = renamed_property("untouched", "not_selected")
    basis = renamed_property("basis", "price_source")

    def to_dict(self) -> dict[str, Any]:
        """JSON form, which uses the original names of renamed fields."""
        names = {"skipped": "left", "not_selected": "untouched", "price_source": "basis"}
        return {**plain_data(self, **names), "macs": self.macs}

    def __str__(self) -> str:
        table = aligned([_COLUMNS, *map(_cells, self.sites)])
        return "\n".join([*self._head(), *table, *self._tail()])

    # a terminal or notebook shows the last value by its repr
    __repr__ = __str__

    def _head(self) -> list[str]:
        share = 100 * self.mhsa_macs_dense / max(1, self.macs_dense)
        head = (
            f"{self.model} ({self.backbone}), {self.strategy} on {len(self.sites)} sites, "
            f"input {shape_text(self.input_shape)}"
        )
        lines = [f"{head}: {self.no_fast_kernel}" if self.no_fast_kernel else head]
        if self.speed is not None:
            note = self.windows or loses_time(self.speed, self.instead)
            lines = [f"{head}: {note}" if note else head, whole_model(self.speed)]
        return [
            *lines,
            f"model MACs {macs_text(self.macs_dense)} -> {macs_text(self.macs)}, "
            f"MHSA {macs_text(self.mhsa_macs_dense)} -> {macs_text(self.mhsa_macs)}, "
            f"predictor {macs_text(self.predictor_macs)} "
            f"(MHSA is {share:.1f} % of the dense model)",
        ]

    def _tail(self) -> list[str]:
        lines = [*self.structures, *self.reductions, *self.tiles]
        lines += [f"{name} keeps every token: {reason}" for name, reason in self.whole_blocks]
        lines += [f"{row.name}: {row.note}" for row in self.sites if row.note]
        slow = [row for row in self.sites if row.kernel != "dense" and row.speed < 1]
        if slow:
            lines.append(not_faster(len(slow)))
        lines += [f"native: {fault}" for fault in self.native_faults]
        if self.price_source:
            lines.append(self.price_source)
        if self.monitor is not None:
            lines.append(str(self.monitor))
        if self.not_selected:
            lines.append(f"not selected, dense: {', '.join(self.not_selected)}")
        return lines + [f"left alone: {name}: {reason}" for name, reason in self.skipped]


_COLUMNS = ("site", "tokens", "k", "tile", "kernel", "density", "MHSA MACs", "expected", "measured")


def _cells(row: SiteReport) -> Row:
    k = "-" if row.k is None else str(row.k)
    tile = shape_text(row.tile)
    density = "?" if row.density is None else f"{row.density:.3f}"
    change = f"{macs_text(row.macs_dense)} -> {macs_text(row.macs)}"
    speeds = speed_text(row.expected), speed_text(row.measured)
    return row.name, str(row.tokens), k, tile, row.kernel, density, change, *speeds


def report(state: PatchState, total: int | None = None) -> Report:
    """The report of a patch; see `Patch.report`.

    Args:
        state: The patch.
        total: MACs of the dense model, where they are known.
    """
    run, dense = _runs(state, total)
    expected = list(expect_all(state, run))
    rows = tuple(_site_report(*site, run) for site in expected)
    not_selected = [site for site in state.model_sites if site not in state.sites]
    known = [row.macs for row in rows if row.macs is not None]
    mhsa_dense = sum(site.macs for site in state.model_sites)
    other = other_macs(state, run, dense)
    counted = len(known) == len(rows) and not (run is not None and run.ragged)
    speed = None
    like = next(state.model.parameters(), None)
    device = "cpu" if like is None else like.device.type
    # prices of other devices do not apply to one without kernels
    if other and not (run is not None and run.ragged) and not no_fast_kernel(device):
        speeds = {row.name: row.speed for row in rows}
        sparse = sum(row.kernel != "dense" for row in rows)
        speed = model_speed(state, run, dense, speeds, sparse)
    slow = {row.name for row in rows if row.speed < SLOWER}
    slow = slow or {row.name for row in rows if row.kernel != "dense"}
    choices = {site.site.name: e.choice for site, e in expected if site.site.name in slow}
    return Report(
        model=type(state.model).__name__,
        backbone=state.backbone,
        strategy=state.strategy.name,
        input_shape=state.input_shape,
        sites=rows,
        not_selected=tuple(site.name for site in not_selected),
        skipped=state.skipped + _dense_elsewhere(state),
        macs_dense=dense,
        mhsa_macs_dense=mhsa_dense,
        mhsa_macs=sum(site.macs for site in not_selected) + sum(known) if counted else None,
        predictor_macs=sum(row.predictor_macs for row in rows) + (run.planning if run else 0),
        other_macs=other if counted else None,
        reductions=reduction_lines(state, run),
        price_source=price_source(
            like, sparse=any(row.kernel != "dense" or row.note for row in rows)
        ),
        structures=structure_lines(state.sites),
        whole_blocks=state.whole_blocks,
        speed=speed,
        tiles=tile_lines(expected, run),
        instead=() if speed is None or speed >= SLOWER else tuple(instead(state, choices)),
        no_fast_kernel=no_fast_kernel(device),
        native_faults=build.faults() if device == "cpu" else (),
        windows=_windows(state, rows),
        monitor=None if state.active_monitor is None else state.active_monitor.report(),
    )


def _windows(state: PatchState, rows: tuple[SiteReport, ...]) -> str:
    """`window_note` for this patch."""
    speeds = {row.name: row.speed for row in rows if row.kernel != "dense"}
    sparse = [site for site in state.sites if site.name in speeds]
    line = window_line(state.model_sites, state.model, state.map_size)
    return window_note(sparse, speeds.values(), line if state.tokens is None else "")


def _dense_elsewhere(state: PatchState) -> tuple[tuple[str, str], ...]:
    """Other models that have run modules of this one."""
    reason = "another model, which shares modules with this one and runs them dense"
    return tuple((name, reason) for name in sorted(state.other_models))


def _runs(state: PatchState, total: int | None) -> tuple[DryRun | None, int]:
    """The dry run of a patch with a token strategy, and the MACs of the dense model.

    Operators without shape inference may have been added to the model after it was patched
    (quantised weights); from then on both run with values.
    """
    try:
        run = dry_run(state) if state.blocks else None
        if total is None:
            total = dense_macs(dry_copy(state, state.model), dry_inputs(state))
        return run, total
    except ProbeFailed:
        if state.attention.example.with_values or not has_data(state.model):
            raise
    example = replace(state.attention.example, with_values=True)
    state.attention = replace(state.attention, example=example)
    return _runs(state, total)


def dense_macs(copied: torch.nn.Module, inputs: MetaInputs) -> int:
    """MACs of the unpatched model for one image, counted in a dry run of a copy."""
    with mac_counter() as counter:
        run_dry(copied, inputs)
    return macs_of(counter)


def _site_report(runtime: SiteRuntime, expected: Expected, run: DryRun | None) -> SiteReport:
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
