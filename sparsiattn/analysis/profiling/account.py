"""Two metered passes, dense and patched, put down to sites and parts."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import fields
from typing import TYPE_CHECKING

from sparsiattn.analysis.profiling.accounting import Accounting, paper_macs
from sparsiattn.analysis.profiling.meter import (
    ATTENTION,
    MLP,
    PREDICTOR,
    REST,
    TOKENS,
    Attended,
    MacCounter,
)
from sparsiattn.analysis.profiling.module_map import batch_of
from sparsiattn.analysis.profiling.result import Latency, Memory, Parts, Profile, SiteProfile
from sparsiattn.analysis.profiling.text import notes
from sparsiattn.attention.site import Site
from sparsiattn.patching.estimate import measured_speed

if TYPE_CHECKING:
    from sparsiattn.analysis.profiling.profiler import Run

Share = dict[str, float]
"""MACs of a whole batch by part."""


class Account:
    """Both passes, put down to sites and parts."""

    def __init__(self, run: Run, dense: MacCounter, patched: MacCounter) -> None:
        self.run, self.anatomy, self.runtimes = run, run.anatomy, run.runtimes
        self.images = len(batch_of(run.given))
        self.calls: defaultdict[str, list[Attended]] = defaultdict(list)
        for call in patched.attended:
            self.calls[call.site].append(call)
        self.patched = patched
        self.dense = self._shares(dense, {})
        self.own = self._shares(patched, {name: self._own(name) for name in self.calls})
        self.computed = self._shares(patched, {name: self._ran(name) for name in self.calls})
        self.paper = self._shares(patched, {name: self._paper(name) for name in self.calls})

    def _own(self, name: str) -> Share:
        spent = self.patched.spent
        planned = spent[PREDICTOR, name] + spent[TOKENS, name]
        return {"mhsa": sum(call.macs for call in self.calls[name]), "predictor": planned}

    def _ran(self, name: str) -> Share:
        calls = self.calls[name]
        ran = sum(call.macs if call.computed is None else call.computed for call in calls)
        return {**self._own(name), "mhsa": ran}

    def _paper(self, name: str) -> Share:
        calls, runtime = self.calls[name], self.runtimes[name]
        each = self.patched.spent[PREDICTOR, name] / len(calls)
        keys = runtime.site.keys
        both = [paper_macs(call, runtime.strategy, keys, each) for call in calls]
        return {"mhsa": sum(a for a, _ in both), "predictor": sum(b for _, b in both)}

    def _shares(self, meter: MacCounter, seen: dict[str, Share]) -> dict[str, Share]:
        """MACs of every site by part. seen: of those whose attention was counted by itself; that
        of others is as dense as their shape says, and lies in what their module spent."""
        closed = {site.name: site.macs * self.images for site in self.anatomy.sites}
        found: dict[str, Share] = {
            name: {"mhsa": float(macs), **seen.get(name, {})} for name, macs in closed.items()
        }
        for inside in self.anatomy.attention.values():
            whole = meter.spent[ATTENTION, inside[0]]
            hidden = sum(closed[name] for name in inside if name not in seen)
            found[inside[0]]["projections"] = whole - hidden
        for first in self.anatomy.blocks.values():
            found[first]["mlp"] = meter.spent[MLP, first]
        found[""] = {"rest": meter.spent[REST, ""]}
        return found

    def _parts(self, share: Share) -> Parts:
        names = [field.name for field in fields(Parts)]
        return Parts(*(round(share.get(name, 0.0) / self.images) for name in names))

    def _total(self, shares: dict[str, Share]) -> Parts:
        total: defaultdict[str, float] = defaultdict(float)
        for share in shares.values():
            for name, macs in share.items():
                total[name] += macs
        return self._parts(total)

    def _site(self, site: Site) -> SiteProfile:
        runtime, calls = self.runtimes.get(site.name), self.calls.get(site.name, [])
        chosen = [call.choice for call in calls if call.choice is not None]
        whole = site.tokens * site.windows
        dense, own, computed, paper = (
            self._parts(shares[site.name])
            for shares in (self.dense, self.own, self.computed, self.paper)
        )
        measured = None
        if runtime is not None and chosen:
            measured = measured_speed(runtime, runtime.site, chosen[-1])
        return SiteProfile(
            name=site.name,
            strategy="" if runtime is None else runtime.strategy.name,
            kernel=", ".join(dict.fromkeys(choice.kernel.name for choice in chosen)) or "dense",
            tokens=self._tokens(site, calls) if calls else whole,
            tokens_dense=whole,
            windows=site.windows,
            density=_density(calls),
            dense=dense,
            own=own,
            computed=computed,
            paper=paper,
            left_dense=runtime is not None and runtime.dense,
            expected=chosen[-1].expected if chosen else None,
            measured=measured,
        )

    def _tokens(self, site: Site, calls: list[Attended]) -> int:
        """Queries of one image, the mean over images that keep different numbers."""
        rows = sum(call.queries * call.lists for call in calls)
        return round(rows / (site.heads * site.calls * self.images))

    def profile(
        self, accounting: Accounting, latency: Latency | None, memory: Memory | None
    ) -> Profile:
        sites = tuple(self._site(site) for site in self.anatomy.sites)
        found = Profile(
            model=type(self.run.model).__name__,
            backbone=self.anatomy.backbone,
            strategy=", ".join(patch.strategy.name for patch in self.run.live),
            input_shape=tuple(batch_of(self.run.given).shape),
            images=self.images,
            accounting=accounting,
            dense=self._total(self.dense),
            own=self._total(self.own),
            computed=self._total(self.computed),
            paper=self._total(self.paper),
            sites=sites,
            latency=latency,
            memory=memory,
        )
        return notes(found)


def _density(calls: list[Attended]) -> float:
    every = sum(call.all_pairs * call.lists for call in calls)
    return sum(call.pairs * call.lists for call in calls) / every if every else 1.0
