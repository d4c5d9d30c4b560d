"""`inspect`: a model's attention and what every strategy could save there, nothing changed."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import nn

from sparsiattn.attention import Grid
from sparsiattn.errors import GuessedStructure, ProbeFailed, SparsiattnError, renamed_property
from sparsiattn.patching import Patch, Report, SiteReport
from sparsiattn.patching.apply import plan_patch
from sparsiattn.patching.discovery.meta_model import has_data, meta_copy, value_copy
from sparsiattn.patching.report import dense_macs, report
from sparsiattn.patching.survey import ModelSurvey, survey
from sparsiattn.patching.text import (
    Row,
    macs_text,
    percent,
    plain,
    plain_data,
    shape_text,
    structure_lines,
)
from sparsiattn.registry import REGISTRY
from sparsiattn.registry.registry import METHODS
from sparsiattn.runtime.multihead import swap_back
from sparsiattn.runtime.patch_state import PATCH_ATTRIBUTE, live_patches, unwrap
from sparsiattn.runtime.restore import unwatch
from sparsiattn.runtime.site_runtime import PLANNER
from sparsiattn.strategies import Config

T = TypeVar("T")

NO_SITES = (
    "no module of the model calls scaled dot product attention (or writes it out) in a way that "
    "can be served"
)
# Options that say how much a strategy leaves, by the names in use.
BUDGETS = ("k", "keep", "r", "ratio")
# What `SiteInspection` takes over from `Site`, beside its name and MACs.
_SIZES = ("tokens", "keys", "heads", "head_dim", "grid", "prefix_tokens", "windows", "calls")


@dataclass(frozen=True)
class SiteInspection:
    """One attention call that can be patched; sizes are those of one window, as in `Site`.

    Attributes:
        name: Module path.
        tokens: Queries, prefix included.
        keys: Keys, prefix included.
        heads: Attention heads.
        head_dim: Width of a query and a key.
        grid: Rows and columns of the patch tokens; those of several views one below the other.
        prefix_tokens: Tokens that are not image patches.
        structure: Where these stand and where that is known from, in words.
        windows: Windows of one image.
        calls: Attention calls in one forward pass.
        macs: Of QK^T and AV for one image, dense.
        share: Those as a share of the whole model's MACs.
        saves: By attention strategy, the share of the whole model's MACs that it would save here,
            the cost of choosing keys subtracted; None where only a real input can tell.
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
    """What one strategy would save, with its default options and at every site or block it takes.

    Attributes:
        name: Name of the strategy.
        kind: What it makes fewer of: ``"attention"``, ``"tokens"`` or ``"both"``.
        budget: Its options that say how much stays.
        saves: Share of the whole model's MACs, negative where choosing costs more than it saves;
            None if ``reason`` is set, or if only a real input can tell.
        reason: Why this model cannot have the strategy, else empty.
        notes: What is unusual about its sites, and blocks that keep every token.
    """

    name: str
    kind: str
    budget: str = ""
    saves: float | None = None
    reason: str = ""
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        name = f"{self.name} {self.budget}".rstrip()
        if self.reason:
            return f"{self.name}: not on this model: {self.reason}"
        return "; ".join([f"{name}: {percent(self.saves)}", *self.notes])


@dataclass(frozen=True)
class Inspection:
    """The attention of a model, as it is unpatched. ``print`` it, or take `to_dict`.

    Attributes:
        model: Class of the model.
        backbone: The adapter that knows the model.
        input_shape: Shape of the images it ran with.
        macs: Of the whole model for one image.
        sites: What can be patched.
        skipped: ``(name, reason)`` of every other attention call.
        strategies: What each strategy would save.
        patched: The live patch in words, empty without one.
    """

    model: str
    backbone: str
    input_shape: tuple[int, ...]
    macs: int
    sites: tuple[SiteInspection, ...]
    skipped: tuple[tuple[str, str], ...]
    strategies: tuple[StrategySaving, ...]
    patched: str = ""

    left = renamed_property("left", "skipped")

    @property
    def mhsa_macs(self) -> int:
        """MACs of QK^T and AV at all sites."""
        return sum(site.macs for site in self.sites)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {**plain_data(self, skipped="left"), "mhsa_macs": self.mhsa_macs}

    def __str__(self) -> str:
        return plain([*self.head(), self.table(), *self.tail()])

    def head(self) -> list[str]:
        """Lines above the table of sites."""
        lines = [
            f"{self.model} ({self.backbone}), {len(self.sites)} sites, input "
            f"{shape_text(self.input_shape)}, {macs_text(self.macs)} MACs, of them MHSA "
            f"{macs_text(self.mhsa_macs)} ({percent(self.mhsa_macs / max(1, self.macs))})"
        ]
        return lines + ([f"described as it is without {self.patched}"] if self.patched else [])

    def table(self) -> list[Row]:
        """Cells of the sites, a heading first; columns that would say nothing are left out."""
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
        lines += [f"left alone: {name}: {reason}" for name, reason in self.skipped]
        if not self.sites:
            return [*lines, f"no strategy: {NO_SITES}"]
        if self.strategies:
            lines.append("saved of the whole model's MACs (not of its time), by default options:")
        return lines + [f"  {saving}" for saving in self.strategies]


def inspect(
    model: nn.Module, input: Any = None, *, strategies: str | Iterable[str] | None = None
) -> Inspection:
    """Describe a model's attention: what can be patched, and what that could save.

    Figures come from dry runs of a copy, without data wherever the model runs so: weights, hooks
    and random numbers stay as they are. A model without attention to patch is no error: it has no
    sites.

    Args:
        model: Any module, also one on the meta device or a patched one, which is described as it is
            without the patch.
        input: Image shape or example, as `patch` takes it.
        strategies: Names of those to try with their default options; by default all that are
            registered but the published methods of ``sparsiattn.methods``.

    Returns:
        Sites and savings.

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
    # a plug-in's planner may draw its first weights from the global generator
    with torch.random.fork_rng(devices=[]):
        total = dense_macs(_copy_like(surveyed, copied), surveyed.inputs())
        outcomes = {config: _try(config, copied, example, surveyed, total) for config in configs}
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
        strategies=tuple(_saving(*outcome, total) for outcome in outcomes.items()),
        patched=", ".join(map(repr, patches)),
    )


def survey_unpatched(
    model: nn.Module, patches: list[Patch], look: Callable[[nn.Module], T]
) -> tuple[nn.Module, T]:
    """A copy without patches, and what was found in it; it has no data if the model runs without.

    Args:
        model: The model.
        patches: Its live patches.
        look: Takes the copy.
    """
    copied = unpatched_meta_copy(model, patches)
    try:
        return copied, look(copied)
    except ProbeFailed:
        if not has_data(model):
            raise
    copied = _unpatched(model, value_copy(model), patches)
    return copied, look(copied)


def _copy_like(surveyed: ModelSurvey, copied: nn.Module) -> nn.Module:
    copy = value_copy if surveyed.example.with_values else meta_copy
    return copy(copied)  # type: ignore[no-any-return]


def _configs(names: str | Iterable[str] | None) -> list[type[Config]]:
    if names is None:
        strategies = REGISTRY.all("strategies").items()
        return [s for name, s in strategies if REGISTRY.plugin_of("strategies", name) != METHODS]
    names = [names] if isinstance(names, str) else dict.fromkeys(names)
    return [REGISTRY.get("strategies", name) for name in names]


def patches_in(model: nn.Module) -> list[Patch]:
    """Live patches of a model and of its parts, each once."""
    return list(dict.fromkeys(patch for _, patch in live_patches(model)))


def unpatched_meta_copy(model: nn.Module, patches: list[Patch]) -> nn.Module:
    """A copy of a model without data and without the marks of these patches."""
    return _unpatched(model, meta_copy(model), patches)


def _unpatched(model: nn.Module, copied_model: nn.Module, patches: list[Patch]) -> nn.Module:
    """A copy that still carries the marks of these patches, without them."""
    planners = {id(runtime.planner) for patch in patches for runtime in patch.runtimes}
    # listed, because the loop takes modules out
    for module, copied in zip(model.modules(), list(copied_model.modules()), strict=True):
        if id(module._modules.get(PLANNER)) in planners:
            del copied._modules[PLANNER]
        unwatch(copied)
        swap_back(copied)
        vars(copied).pop(PATCH_ATTRIBUTE, None)
    return copied_model


def example_input(model: nn.Module, example: Any, patches: list[Patch]) -> Any:
    """The input to describe a model for: where none is given, that of the model's own patch."""
    examples = [
        patch.attention.example
        for patch in patches
        if patch.model is model and not patch.follows_model
    ]
    return examples[0] if example is None and examples else example


def _try(
    config: type[Config], meta_model: nn.Module, example: Any, surveyed: ModelSurvey, total: int
) -> Report | str:
    """The report of a patch that is never attached, or why there can be none."""
    if not surveyed.sites:
        return NO_SITES
    try:
        with warnings.catch_warnings():
            # the inspection itself names what is a guess
            warnings.simplefilter("ignore", GuessedStructure)
            planned = plan_patch(meta_model, config.build({}), example=example, surveyed=surveyed)
        return report(planned, total)
    except SparsiattnError as error:
        return str(error)
    except Exception as error:  # of a plug-in: its fault must not hide what the others could do
        return f"{type(error).__name__}: {error}"


def _share(macs: int | None, total: int) -> float | None:
    return None if macs is None else macs / max(1, total)


def _saved(row: SiteReport) -> int | None:
    return None if row.macs is None else row.macs_dense - row.macs - row.predictor_macs


def _saving(config: type[Config], outcome: Report | str, total: int) -> StrategySaving:
    if isinstance(outcome, str):
        return StrategySaving(config.name, config.kind, reason=outcome)
    strategy = config.build({})
    budgets = {name: getattr(strategy, name, None) for name in BUDGETS}
    notes = Counter(row.note for row in outcome.sites if row.note)
    whole = [f"{name} keeps every token: {reason}" for name, reason in outcome.whole_blocks]
    return StrategySaving(
        name=config.name,
        kind=config.kind,
        budget=", ".join(f"{name}={value}" for name, value in budgets.items() if value is not None),
        saves=_share(None if outcome.macs is None else total - outcome.macs, total),
        notes=(*(f"{note} (sites: {count})" for note, count in notes.items()), *whole),
    )
