"""`inspect`: a model's attention and what every strategy could save there, nothing changed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from sparsiattn.attention.geometry import Grid
from sparsiattn.attention.site import Site
from sparsiattn.errors import SparsiattnError
from sparsiattn.patching.apply import plan_patch
from sparsiattn.patching.discovery.meta_model import meta_copy
from sparsiattn.patching.handle import Patch
from sparsiattn.patching.report import Report, SiteReport, aligned, dense_macs, macs_text, report
from sparsiattn.patching.survey import ModelSurvey, survey
from sparsiattn.registry.registry import METHODS, REGISTRY
from sparsiattn.runtime.multihead import swap_back
from sparsiattn.runtime.patch_state import PATCH_ATTRIBUTE, live_patches, unwrap
from sparsiattn.runtime.restore import unwatch
from sparsiattn.runtime.site_runtime import PLANNER
from sparsiattn.strategies.config import Config

NO_SITES = (
    "no module of the model calls scaled dot product attention (or writes it out) in a way that "
    "can be served"
)
# Options that say how much a strategy leaves, by the names in use.
BUDGETS = ("k", "keep", "r", "ratio")


@dataclass(frozen=True)
class SiteInspection:
    """One attention call that can be patched; sizes are those of one window, as in `Site`.

    macs: of QK^T and AV for one image, dense; share: theirs of the whole model's. saves: by
    attention strategy, the share of the whole model's MACs that it would save at this site, what
    choosing the keys costs subtracted; None where only a real input can tell.
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
    saves: dict[str, float | None] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class StrategySaving:
    """What one strategy would save, with its default options and at every site or block it takes.

    kind: what it makes fewer of (``"attention"``, ``"tokens"``, ``"both"``). budget: its options
    that say how much stays. saves: share of the whole model's MACs, negative where choosing costs
    more than it spares; None if ``reason`` says why this model cannot have it, or if only a real
    input can tell. notes: what is unusual about its sites.
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

    backbone: the adapter that knows the model. input_shape: of the images it was run with. sites:
    what can be patched. left: ``(name, reason)`` of every other call of attention.
    strategies: what each would save. macs: of the whole model, one image; patched: the live patch
    in words, empty without one.
    """

    model: str
    backbone: str
    input_shape: tuple[int, ...]
    macs: int
    sites: tuple[SiteInspection, ...]
    skipped: tuple[tuple[str, str], ...]
    strategies: tuple[StrategySaving, ...]
    patched: str = ""

    @property
    def mhsa_macs(self) -> int:
        """MACs of QK^T and AV at all sites."""
        return sum(site.macs for site in self.sites)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "mhsa_macs": self.mhsa_macs}

    def __str__(self) -> str:
        return "\n".join([*self.head(), *aligned(self.table()), *self.tail()])

    def head(self) -> list[str]:
        """Lines above the table of sites."""
        share = self.mhsa_macs / max(1, self.macs)
        lines = [
            f"{self.model} ({self.backbone}), {len(self.sites)} sites, input "
            f"{'x'.join(map(str, self.input_shape))}, {macs_text(self.macs)} MACs, of them MHSA "
            f"{macs_text(self.mhsa_macs)} ({percent(share)})"
        ]
        return lines + ([f"described as it is without {self.patched}"] if self.patched else [])

    def table(self) -> list[tuple[str, ...]]:
        """The sites in cells, a heading first; columns that would say nothing are left out."""
        if not self.sites:
            return []
        columns = {
            "site": [site.name for site in self.sites],
            "tokens": [str(site.tokens) for site in self.sites],
            "keys": [str(site.keys) for site in self.sites],
            "heads": [str(site.heads) for site in self.sites],
            "head_dim": [str(site.head_dim) for site in self.sites],
            "grid": ["x".join(map(str, site.grid)) for site in self.sites],
            "prefix": [str(site.prefix_tokens) for site in self.sites],
            "windows": [str(site.windows) for site in self.sites],
            "calls": [str(site.calls) for site in self.sites],
            "share": [percent(site.share) for site in self.sites],
        }
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
        lines = [f"left alone: {name}: {reason}" for name, reason in self.skipped]
        if not self.sites:
            return [*lines, f"no strategy: {NO_SITES}"]
        if self.strategies:
            lines.append("saved of the whole model's MACs (not of its time), by default options:")
        return lines + [f"  {saving}" for saving in self.strategies]


def percent(share: float | None) -> str:
    """A share as text: ``0.123`` is ``12.3 %``, unknown ``?``."""
    # adding zero turns minus zero, which rounding leaves behind, into zero
    return "?" if share is None else f"{round(100 * share, 1) + 0.0:.1f} %"


def inspect(
    model: nn.Module, input: Any = None, *, strategies: str | Iterable[str] | None = None
) -> Inspection:
    """What attention a model has, which of it can be patched, and what that could save.

    model: any module, also a patched one (described as it is without the patch) or one on the meta
    device. input: image shape or example tensor, needed only where the model does not say.
    strategies: names of those to try, by default all that are registered but the collection of
    published methods (``sparsiattn.methods``, which one may name), each with its default
    options. Figures come from dry runs of a copy without data: weights, hooks and random numbers
    stay as they are. A model without attention to patch is no error: it has no sites.

    >>> import sparsiattn
    >>> from sparsiattn.testing.hosts import tiny_vit
    >>> found = sparsiattn.inspect(tiny_vit(), strategies=["local"])
    >>> [(site.name, site.tokens, site.heads, site.grid) for site in found.sites]
    [('blocks.0.attn', 65, 3, (8, 8)), ('blocks.1.attn', 65, 3, (8, 8))]
    """
    kinds = _kinds(strategies)
    model = unwrap(model)
    live = list({id(one): one for _, one in live_patches(model)}.values())
    meta_model = bare(model, live)
    example = _example(model, input, live)
    # a plug-in's planner may draw its first weights from the global generator
    with torch.random.fork_rng(devices=[]):
        seen = survey(meta_model, example)
        total = dense_macs(meta_model, seen.backbone.meta_inputs(meta_model, seen.shape))
        tried = {kind.name: _tried(kind, meta_model, example, seen, total) for kind in kinds}
    by_site = {
        kind.name: {row.name: _share(_saved(row), total) for row in outcome.sites}
        for kind in kinds
        if kind.kind == "attention" and isinstance(outcome := tried[kind.name], Report)
    }
    return Inspection(
        model=type(model).__name__,
        backbone=seen.backbone.name,
        input_shape=seen.shape,
        macs=total,
        sites=tuple(_site(site, total, by_site) for site, _ in seen.sites),
        skipped=tuple(seen.skipped),
        strategies=tuple(_saving(kind, tried[kind.name], total) for kind in kinds),
        patched=", ".join(map(repr, live)),
    )


def _kinds(names: str | Iterable[str] | None) -> list[type[Config]]:
    if names is None:
        found = REGISTRY.all("strategies").items()
        return [s for n, s in found if REGISTRY.plugin_of("strategies", n) != METHODS]
    given = [names] if isinstance(names, str) else dict.fromkeys(names)
    return [REGISTRY.get("strategies", name) for name in given]


def bare(model: nn.Module, live: list[Patch]) -> nn.Module:
    """A copy without data that carries no patch."""
    planners = {id(runtime.planner) for patch in live for runtime in patch.runtimes}
    meta_model: nn.Module = meta_copy(model)
    for module, twin in zip(model.modules(), list(meta_model.modules()), strict=True):
        if id(module._modules.get(PLANNER)) in planners:
            del twin._modules[PLANNER]
        unwatch(twin)
        swap_back(twin)
        vars(twin).pop(PATCH_ATTRIBUTE, None)
    return meta_model


def _example(model: nn.Module, given: Any, live: list[Patch]) -> Any:
    """The input to describe: where none is given, the one that the model's patch was given."""
    told = [patch for patch in live if patch.model is model and not patch.follows_model]
    return told[0].input_shape if given is None and told else given


def _tried(
    kind: type[Config], meta_model: nn.Module, example: Any, seen: ModelSurvey, total: int
) -> Report | str:
    """The report of a patch that is never attached, or why there can be none."""
    if not seen.sites:
        return NO_SITES
    try:
        return report(plan_patch(meta_model, kind.build({}), example=example, found=seen), total)
    except SparsiattnError as error:
        return str(error)
    except Exception as error:  # of a plug-in: its fault must not hide what the others could do
        return f"{type(error).__name__}: {error}"


def _share(macs: int | None, total: int) -> float | None:
    return None if macs is None else macs / max(1, total)


def _saved(row: SiteReport) -> int | None:
    return None if row.macs is None else row.macs_dense - row.macs - row.predictor_macs


def _saving(kind: type[Config], outcome: Report | str, total: int) -> StrategySaving:
    if isinstance(outcome, str):
        return StrategySaving(kind.name, kind.kind, reason=outcome)
    config, sparse = kind.build({}), outcome.macs
    given = {name: getattr(config, name, None) for name in BUDGETS}
    notes = Counter(row.note for row in outcome.sites if row.note)
    return StrategySaving(
        name=kind.name,
        kind=kind.kind,
        budget=", ".join(f"{name}={value}" for name, value in given.items() if value is not None),
        saves=_share(None if sparse is None else total - sparse, total),
        notes=tuple(f"{note} (sites: {count})" for note, count in notes.items()),
    )


def _site(
    site: Site, total: int, by_strategy: dict[str, dict[str, float | None]]
) -> SiteInspection:
    return SiteInspection(
        name=site.name,
        tokens=site.tokens,
        keys=site.keys,
        heads=site.heads,
        head_dim=site.head_dim,
        grid=site.grid,
        prefix_tokens=site.prefix_tokens,
        windows=site.windows,
        calls=site.calls,
        macs=site.macs,
        share=site.macs / max(1, total),
        saves={name: shares[site.name] for name, shares in by_strategy.items()},
    )
