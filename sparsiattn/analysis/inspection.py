"""`inspect`: describe a model's attention and the possible savings, without changing the model."""

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
    "no module of the model computes scaled dot product attention (by torch's function or by hand) "
    "in a way that can be patched"
)
# Names of the options that are budgets of strategies.
BUDGETS = ("k", "keep", "r", "ratio")
# Fields of `SiteInspection` that are copied from `Site`, in addition to name and MACs.
_SIZES = ("tokens", "keys", "heads", "head_dim", "grid", "prefix_tokens", "windows", "calls")


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
            return f"{self.name}: not for this model: {self.reason}"
        return "; ".join([f"{name}: {percent(self.saves)}", *self.notes])


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
        lines += [f"left alone: {name}: {reason}" for name, reason in self.skipped]
        if not self.sites:
            return [*lines, f"no strategy: {NO_SITES}"]
        if self.strategies:
            lines.append("saved of the whole model's MACs (not of its time), by default options:")
        return lines + [f"  {saving}" for saving in self.strategies]


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
    """A copy without patches, and the result of a function of it.

    The copy has no data (it is on the meta device), if the model can run this way.

    Args:
        model: The model.
        patches: Its active patches.
        look: Function that gets the copy.
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
    """Active patches of a model and of its submodules, each once."""
    return list(dict.fromkeys(patch for _, patch in live_patches(model)))


def unpatched_meta_copy(model: nn.Module, patches: list[Patch]) -> nn.Module:
    """A copy of a model without data and without these patches."""
    return _unpatched(model, meta_copy(model), patches)


def _unpatched(model: nn.Module, copied_model: nn.Module, patches: list[Patch]) -> nn.Module:
    """Remove these patches from a copy of the model."""
    planners = {id(runtime.planner) for patch in patches for runtime in patch.runtimes}
    # a list, because the loop removes modules
    for module, copied in zip(model.modules(), list(copied_model.modules()), strict=True):
        if id(module._modules.get(PLANNER)) in planners:
            del copied._modules[PLANNER]
        unwatch(copied)
        swap_back(copied)
        vars(copied).pop(PATCH_ATTRIBUTE, None)
    return copied_model


def example_input(model: nn.Module, example: Any, patches: list[Patch]) -> Any:
    """The input for the description: the user's, or else that of the model's own patch."""
    examples = [
        patch.attention.example
        for patch in patches
        if patch.model is model and not patch.follows_model
    ]
    return examples[0] if example is None and examples else example


def _try(
    config: type[Config], meta_model: nn.Module, example: Any, surveyed: ModelSurvey, total: int
) -> Report | str:
    """The report of a patch that is planned but not attached, or why there is none."""
    if not surveyed.sites:
        return NO_SITES
    try:
        with warnings.catch_warnings():
            # the inspection itself shows guessed structures
            warnings.simplefilter("ignore", GuessedStructure)
            planned = plan_patch(meta_model, config.build({}), example=example, surveyed=surveyed)
        return report(planned, total)
    except SparsiattnError as error:
        return str(error)
    except Exception as error:  # an error of a plug-in must not hide other strategies
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
    unreduced = [f"{name} keeps every token: {reason}" for name, reason in outcome.whole_blocks]
    return StrategySaving(
        name=config.name,
        kind=config.kind,
        budget=", ".join(f"{name}={value}" for name, value in budgets.items() if value is not None),
        saves=_share(None if outcome.macs is None else total - outcome.macs, total),
        notes=(*(f"{note} (sites: {count})" for note, count in notes.items()), *unreduced),
    )
