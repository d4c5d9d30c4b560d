"""`Report`: what a patch does (kernels, density, MACs before and after, what was skipped)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from sparsiattn.errors import ProbeFailed, renamed_property
from sparsiattn.kernels.native import build
from sparsiattn.patching.alternatives import tile_lines, window_line, window_note
from sparsiattn.patching.break_even import break_even_lines
from sparsiattn.patching.discovery.meta_model import MetaInputs, has_data, run_dry
from sparsiattn.patching.dry_run import DryRun, dry_copy, dry_inputs, dry_run
from sparsiattn.patching.estimate import expect_all
from sparsiattn.patching.flop_counter import mac_counter, macs_of
from sparsiattn.patching.model_speed import instead, model_speed, other_macs
from sparsiattn.patching.reduction_lines import reduction_lines
from sparsiattn.patching.report_lines import (
    SLOWER,
    estimated_from,
    loses_time,
    no_fast_kernel,
    not_faster,
    price_source,
    whole_model,
)
from sparsiattn.patching.site_report import SiteReport, site_report
from sparsiattn.patching.text import (
    Row,
    aligned,
    macs_text,
    plain_data,
    shape_text,
    speed_text,
    structure_lines,
)
from sparsiattn.runtime import placement
from sparsiattn.runtime.monitor import MonitorReport
from sparsiattn.runtime.patch_state import PatchState


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
        estimated_from: The published figures from which the prices were derived; empty if they
            were measured.
        break_even: On a GPU, the products of batch, heads and squared tokens from which on sparse
            attention is expected to beat dense attention, in words.

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
    estimated_from: str = ""
    break_even: tuple[str, ...] = ()

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
            note = self.windows or loses_time(self.speed, self.instead, self.estimated_from)
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
        lines += self.break_even
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
    rows = tuple(site_report(*site, run) for site in expected)
    not_selected = [site for site in state.model_sites if site not in state.sites]
    known = [row.macs for row in rows if row.macs is not None]
    mhsa_dense = sum(site.macs for site in state.model_sites)
    other = other_macs(state, run, dense)
    counted = len(known) == len(rows) and not (run is not None and run.ragged)
    speed = None
    like = next(state.model.parameters(), None)
    device = placement.device_of(like).type
    # prices of other devices do not apply to one without kernels
    if other and not (run is not None and run.ragged) and not no_fast_kernel(device):
        speeds = {row.name: row.speed for row in rows}
        sparse = sum(row.kernel != "dense" for row in rows)
        speed = model_speed(state, run, dense, speeds, sparse)
    slow = {row.name for row in rows if row.speed < SLOWER}
    slow = slow or {row.name for row in rows if row.kernel != "dense"}
    slow_sites = {site.site.name: e for site, e in expected if site.site.name in slow}
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
        instead=() if speed is None or speed >= SLOWER else tuple(instead(state, slow_sites)),
        no_fast_kernel=no_fast_kernel(device),
        native_faults=build.faults() if device == "cpu" else (),
        windows=_windows(state, rows),
        monitor=None if state.active_monitor is None else state.active_monitor.report(),
        estimated_from=estimated_from(like),
        break_even=break_even_lines(expected) if device == "cuda" else (),
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
