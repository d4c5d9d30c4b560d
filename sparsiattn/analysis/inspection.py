"""`inspect`: describe a model's attention and the possible savings, without changing the model."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from sparsiattn.analysis.attention_bound import bound_of, bound_text
from sparsiattn.analysis.unpatched import example_input, patches_in, survey_unpatched
from sparsiattn.attention import Grid
from sparsiattn.errors import GuessedStructure, SparsiattnError, renamed_property
from sparsiattn.patching import Report, SiteReport
from sparsiattn.patching.apply import plan_patch
from sparsiattn.patching.discovery.meta_model import meta_copy, value_copy
from sparsiattn.patching.report import dense_macs, report
from sparsiattn.patching.survey import ModelSurvey, survey
from sparsiattn.patching.text import (
    Row,
    macs_text,
    percent,
    plain,
    plain_data,
    shape_text,
    speed_text,
    structure_lines,
)
from sparsiattn.registry import REGISTRY
from sparsiattn.registry.registry import METHODS
from sparsiattn.runtime.patch_state import unwrap
from sparsiattn.strategies import Config, Hybrid

NO_SITES = (
    "no module of the model computes scaled dot product attention (by torch's function or by hand) "
    "in a way that can be patched"
)
# Names of the options that are budgets of strategies.
BUDGETS = ("k", "keep", "r", "ratio")
# Fields of `SiteInspection` that are copied from `Site`, in addition to name and MACs.
_SIZES = ("tokens", "keys", "heads", "head_dim", "grid", "prefix_tokens", "windows", "calls")

COLUMNS_NOTE = "share: of the model's MACs; below a strategy: how much of them it saves there"


@dataclass(frozen=True)
class SiteInspection:
    """One attention call that can be patched; sizes are those of one window, as in `Site`.

    Attributes:
        name: Module path.
        tokens: Number of queries, prefix included.
        keys: Number of keys, prefix included.
        heads: Number of attention heads.
        head_dim: Channels of a query and a key.
        grid: Rows and columns of the patch tokens; several views are stacked vertically.
        prefix_tokens: Number of tokens that are not image patches.
        structure: Description of the positions of these tokens, and how they are known.
        windows: Number of windows per image.
        calls: Number of attention calls in one forward pass.
        macs: MACs of QK^T and AV for one image, dense.
        share: Share of these in the whole model's MACs.
        saves: By attention strategy, the share of the whole model's MACs that it would save here,
            minus the cost of selecting keys; None if it depends on the input's values.
    """

    name: str
    tokens: int
    keys: int
    heads: int
    head_dim: int
    grid: Grid
    prefix_tokens: int
    windows: int
    calls: int
    macs: int
    share: float
    structure: str = ""
    saves: dict[str, float | None] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class StrategySaving:
    """The saving of one strategy with default options, at every site or block that it supports.

    Attributes:
        name: Name of the strategy.
        kind: What it reduces: ``"attention"``, ``"tokens"`` or ``"both"``.
        budget: Its budget options.
        saves: Saved share of the whole model's MACs, negative if selecting costs more than it
            saves; None if ``reason`` is set, or if it depends on the input's values.
        reason: Why the strategy does not fit this model; empty if it does.
        notes: Notes on unusual sites, and on blocks that keep every token.
        speed: Expected speed of the whole model relative to dense, as in `Report`; None if it is
            not known.
        speed_reason: Why it is not known.
    """

    name: str
    kind: str
    budget: str = ""
    saves: float | None = None
    reason: str = ""
    notes: tuple[str, ...] = ()
    speed: float | None = None
    speed_reason: str = ""

    def __str__(self) -> str:
        if self.reason:
            return f"{self.name}: not for this model: {self.reason}"
        name, saves, speed = self.cells()
        return "; ".join([f"{name}: {saves} of MACs, {speed} expected", *self.notes])

    def cells(self) -> Row:
        """The strategy, what it saves and its expected speed, as a row of a table."""
        name = f"{self.name} {self.budget}".rstrip()
        return name, percent(self.saves), speed_text(self.speed)

    def remarks(self) -> list[str]:
        """Lines below that table."""
        if self.reason:
            return [str(self)]
        unknown = [f"no expected speed: {self.speed_reason}"] if self.speed_reason else []
        return [f"{self.name}: {note}" for note in (*unknown, *self.notes)]


@dataclass(frozen=True)
class Inspection:
    """The attention of the unpatched model. Print it, or use `to_dict`.

    Attributes:
        model: Class name of the model.
        backbone: Name of the adapter for the model.
        input_shape: Shape of the input images.
        macs: MACs of the whole model for one image.
        sites: Attention calls that can be patched.
        skipped: ``(name, reason)`` of every other attention call.
        strategies: The saving of each strategy.
        patched: Description of the active patch; empty without one.
        price_source: Where the prices of expected speeds come from.

    >>> from sparsiattn.testing.hosts import tiny_vit
    >>> inspection = inspect(tiny_vit(), strategies=["local"])
    >>> inspection.backbone, len(inspection.sites), inspection.mhsa_macs < inspection.macs
    ('timm_vit', 2, True)
    """

    model: str
    backbone: str
    input_shape: tuple[int, ...]
    macs: int
    sites: tuple[SiteInspection, ...]
    skipped: tuple[tuple[str, str], ...]
    strategies: tuple[StrategySaving, ...]
    patched: str = ""
    price_source: str = ""

    left = renamed_property("left", "skipped")

    @property
    def mhsa_macs(self) -> int:
        """MACs of QK^T and AV at all sites."""
        return sum(site.macs for site in self.sites)

    @property
    def bound(self) -> float:
        """How much faster the model could be if attention took no time: fewer keys cannot exceed
        that, fewer tokens can."""
        return bound_of(self.mhsa_macs / max(1, self.macs))

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        figures = {"mhsa_macs": self.mhsa_macs, "bound": self.bound}
        return {**plain_data(self, skipped="left"), **figures}

    def __str__(self) -> str:
        return plain(self.parts())

    # a terminal or notebook shows the last value by its repr
    __repr__ = __str__

    def parts(self) -> list[str | list[Row]]:
        """All of it in order: lines, and tables as rows of cells."""
        return [*self.head(), self.table(), *self.tail(), self.strategy_table(), *self.remarks()]

    def head(self) -> list[str]:
        """Lines above the table of sites."""
        if not self.sites:
            start = f"nothing to patch: {self.model} ({self.backbone}) has no attention that can be"
            return [f"{start} reached, input {shape_text(self.input_shape)}"]
        lines = [
            f"{self.model} ({self.backbone}), {len(self.sites)} sites, input "
            f"{shape_text(self.input_shape)}, {macs_text(self.macs)} MACs, of them MHSA "
            f"{macs_text(self.mhsa_macs)} ({percent(self.mhsa_macs / max(1, self.macs))})",
            f"{bound_text(self.mhsa_macs / max(1, self.macs))}; fewer tokens can give more",
        ]
        return lines + ([f"described without {self.patched}"] if self.patched else [])

    def table(self) -> list[Row]:
        """Rows of the table of sites, header first; columns without information are left out."""
        if not self.sites:
            return []
        columns = {"site": [site.name for site in self.sites]}
        for name in _SIZES:
            cells = [shape_text(getattr(site, name)) for site in self.sites]
            columns[name.removesuffix("_tokens")] = cells
        columns["share"] = [percent(site.share) for site in self.sites]
        if columns["keys"] == columns["tokens"]:
            del columns["keys"]
        if all(site.calls == 1 for site in self.sites):
            del columns["calls"]
        for name in self.sites[0].saves:
            if any(site.saves[name] != 0 for site in self.sites):
                columns[name] = [percent(site.saves[name]) for site in self.sites]
        return [tuple(columns), *zip(*columns.values(), strict=True)]

    def tail(self) -> list[str]:
        """Lines below the table of sites."""
        lines = list(structure_lines(self.sites))
        if self.sites and self.sites[0].saves:
            lines.append(COLUMNS_NOTE)
        lines += [f"left alone: {name}: {reason}" for name, reason in self.skipped]
        if not self.sites:
            return [*lines, f"no strategy: {NO_SITES}"]
        if self.strategies:
            lines.append("strategies with their default options, for one image:")
        return lines

    def strategy_table(self) -> list[Row]:
        """Cells of the strategies that the model can have, a heading first."""
        rows = [one.cells() for one in self.strategies if not one.reason]
        head = ("strategy", "MACs saved", "expected speed")
        return [head, *rows] if rows and self.sites else []

    def remarks(self) -> list[str]:
        """Lines below the table of strategies."""
        if not self.sites:
            return []
        lines = [line for one in self.strategies for line in one.remarks()]
        return lines + ([self.price_source] if self.price_source else [])


def inspect(
    model: nn.Module, input: Any = None, *, strategies: str | Iterable[str] | None = None
) -> Inspection:
    """Describe a model's attention: the calls that can be patched, and the possible savings.

    Figures come from dry runs of a copy, on the meta device if possible. Weights, hooks and random
    state are not changed. A model without attention to patch has no sites, which is not an error.

    Args:
        model: Any module, also on the meta device. A patched model is described without its patch.
        input: Image shape or example, as in `patch`.
        strategies: Names of the strategies to try with their default options; None for all
            registered ones except the published methods of ``sparsiattn.methods``.

    Returns:
        The sites and the savings.

    >>> import sparsiattn
    >>> from sparsiattn.testing.hosts import tiny_vit
    >>> inspection = sparsiattn.inspect(tiny_vit(), strategies=["local"])
    >>> [(site.name, site.tokens, site.heads, site.grid) for site in inspection.sites]
    [('blocks.0.attn', 65, 3, (8, 8)), ('blocks.1.attn', 65, 3, (8, 8))]
    """
    configs = _configs(strategies)
    model = unwrap(model)
    patches = patches_in(model)
    example = example_input(model, input, patches)
    copied, surveyed = survey_unpatched(model, patches, lambda copied: survey(copied, example))
    # a plug-in's planner may draw its initial weights from the global generator
    with torch.random.fork_rng(devices=[]):
        total = dense_macs(_copy_like(surveyed, copied), surveyed.inputs())
        judge = Judge(copied, example, surveyed, total)
        outcomes = {config: judge.report(config) for config in configs}
        savings = tuple(judge.saving(*outcome) for outcome in outcomes.items())
    reports = [outcome for outcome in outcomes.values() if isinstance(outcome, Report)]
    site_savings = {
        config.name: {row.name: _share(_saved(row), total) for row in outcome.sites}
        for config, outcome in outcomes.items()
        if config.kind == "attention" and isinstance(outcome, Report)
    }
    return Inspection(
        model=type(model).__name__,
        backbone=surveyed.backbone.name,
        input_shape=surveyed.shape,
        macs=total,
        sites=tuple(
            SiteInspection(
                name=site.name,
                macs=site.macs,
                share=site.macs / max(1, total),
                structure=str(site.structure),
                saves={name: shares[site.name] for name, shares in site_savings.items()},
                **{name: getattr(site, name) for name in _SIZES},
            )
            for site, _ in surveyed.sites
        ),
        skipped=tuple(surveyed.skipped),
        strategies=savings,
        patched=", ".join(map(repr, patches)),
        price_source=next((r.price_source for r in reports if r.price_source), ""),
    )


def _copy_like(surveyed: ModelSurvey, copied: nn.Module) -> nn.Module:
    copy = value_copy if surveyed.example.with_values else meta_copy
    return copy(copied)  # type: ignore[no-any-return]


def _configs(names: str | Iterable[str] | None) -> list[type[Config]]:
    if names is None:
        strategies = REGISTRY.all("strategies").items()
        return [s for name, s in strategies if REGISTRY.plugin_of("strategies", name) != METHODS]
    names = [names] if isinstance(names, str) else dict.fromkeys(names)
    return [REGISTRY.get("strategies", name) for name in names]


@dataclass(frozen=True)
class Judge:
    """Plans strategies on a model.

    Attributes:
        model: A copy of the model, possibly without data.
        example: The ``input`` of `patch`.
        surveyed: The model's attention.
        total: MACs of the dense model.
    """

    model: nn.Module
    example: Any
    surveyed: ModelSurvey
    total: int

    def report(self, config: type[Config], only_if_faster: bool = False) -> Report | str:
        """The report of a patch that is planned but not attached, or why there is none."""
        if not self.surveyed.sites:
            return NO_SITES
        try:
            with warnings.catch_warnings():
                # the inspection itself shows guessed structures
                warnings.simplefilter("ignore", GuessedStructure)
                planned = plan_patch(
                    self.model,
                    config.build({}),
                    example=self.example,
                    surveyed=self.surveyed,
                    only_if_faster=only_if_faster,
                )
            return report(planned, self.total)
        except SparsiattnError as error:
            return str(error)
        except Exception as error:  # an error of a plug-in must not hide others
            return f"{type(error).__name__}: {error}"

    def saving(self, config: type[Config], outcome: Report | str) -> StrategySaving:
        """The saving of a strategy, from its report."""
        if isinstance(outcome, str):
            return StrategySaving(config.name, config.kind, reason=outcome)
        strategy = config.build({})
        budgets = {name: getattr(strategy, name, None) for name in BUDGETS}
        notes = Counter(row.note for row in outcome.sites if row.note)
        whole = [f"{name} keeps every token: {reason}" for name, reason in outcome.whole_blocks]
        # `patch` lets a hybrid leave sites dense, and MACs are counted without that
        usual = self.report(config, only_if_faster=True) if issubclass(config, Hybrid) else outcome
        reason = _no_speed(usual)
        return StrategySaving(
            name=config.name,
            kind=config.kind,
            budget=", ".join(f"{n}={value}" for n, value in budgets.items() if value is not None),
            saves=_share(None if outcome.macs is None else self.total - outcome.macs, self.total),
            notes=(*(f"{note} (sites: {count})" for note, count in notes.items()), *whole),
            speed=usual.speed if isinstance(usual, Report) and not reason else None,
            speed_reason=reason,
        )


def _no_speed(outcome: Report | str) -> str:
    """Why the speed of the whole model is not known; empty if it is."""
    if isinstance(outcome, str):
        return outcome
    if outcome.no_fast_kernel:
        return outcome.no_fast_kernel
    if outcome.macs is None:
        return "the tokens it keeps depend on the image"
    return "" if outcome.speed is not None else "the model has only attention"


def _share(macs: int | None, total: int) -> float | None:
    return None if macs is None else macs / max(1, total)


def _saved(row: SiteReport) -> int | None:
    return None if row.macs is None else row.macs_dense - row.macs - row.predictor_macs
