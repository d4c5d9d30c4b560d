"""Attribute the MACs of two counted passes, dense and patched, to sites and parts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import fields, replace

from sparsiattn.analysis.profiling.accounting import Accounting, paper_macs
from sparsiattn.analysis.profiling.meter import (
    ATTENTION,
    MLP,
    PREDICTOR,
    REST,
    TOKENS,
    CountedCall,
    MacCounter,
)
from sparsiattn.analysis.profiling.module_map import batch_of
from sparsiattn.analysis.profiling.notes import notes
from sparsiattn.analysis.profiling.result import Latency, Memory, Parts, Profile, SiteProfile
from sparsiattn.analysis.profiling.run import Run
from sparsiattn.attention import Site
from sparsiattn.patching.estimate import measured_speed

Share = dict[str, float]
"""MACs of the whole batch by part, with the names of `Parts`."""


class Account:
    """The MACs of both passes of a run, by site and part."""

    def __init__(self, run: Run, dense: MacCounter, patched: MacCounter) -> None:
        self.run, self.module_map, self.runtimes = run, run.module_map, run.runtimes
        self.batch = batch_of(run.arguments)
        self.spent = patched.spent
        self.calls: defaultdict[str, list[CountedCall]] = defaultdict(list)
        for call in patched.calls:
            self.calls[call.site].append(call)
        attention = {name: self._attention(name) for name in self.calls}
        self.shares = {"dense": self._shares(dense, {})}
        for rule in ("pattern", "computed", "paper"):
            counted = {name: shares[rule] for name, shares in attention.items()}
            self.shares[rule] = self._shares(patched, counted)

    def _attention(self, name: str) -> dict[str, Share]:
        """MACs of attention and planning at a site, by the accounting rule."""
        calls, runtime = self.calls[name], self.runtimes[name]
        key_selection = self.spent[PREDICTOR, name]
        planned = key_selection + self.spent[TOKENS, name]
        computed = sum(call.macs if call.computed is None else call.computed for call in calls)
        paper = [
            paper_macs(call, runtime.planner, runtime.site.keys, key_selection / len(calls))
            for call in calls
        ]
        return {
            "pattern": {"mhsa": sum(call.macs for call in calls), "predictor": planned},
            "computed": {"mhsa": computed, "predictor": planned},
            "paper": {"mhsa": sum(p[0] for p in paper), "predictor": sum(p[1] for p in paper)},
        }

    def _shares(self, counter: MacCounter, counted: Mapping[str, Share]) -> dict[str, Share]:
        """MACs of every site by part.

        Attention in ``counted`` is used directly. At other sites it is dense, is computed from
        their shape, and is subtracted from what their module spent.
        """
        dense = {site.name: site.macs * len(self.batch) for site in self.module_map.sites}
        shares: dict[str, Share] = {
            name: {"mhsa": float(macs), **counted.get(name, {})} for name, macs in dense.items()
        }
        for sites in self.module_map.attention.values():
            uncounted = sum(dense[name] for name in sites if name not in counted)
            shares[sites[0]]["projections"] = counter.spent[ATTENTION, sites[0]] - uncounted
        for site in self.module_map.blocks.values():
            shares[site]["mlp"] = counter.spent[MLP, site]
        shares[""] = {"rest": counter.spent[REST, ""]}
        return shares

    def _parts(self, *shares: Share) -> Parts:
        """MACs for one image, summed over shares."""
        totals = {
            field.name: sum(share.get(field.name, 0.0) for share in shares)
            for field in fields(Parts)
        }
        return Parts(**{part: round(macs / len(self.batch)) for part, macs in totals.items()})

    def _site(self, site: Site) -> SiteProfile:
        runtime, calls = self.runtimes.get(site.name), self.calls.get(site.name, [])
        choices = [call.choice for call in calls if call.choice is not None]
        tokens = site.tokens * site.windows
        measured = None
        if runtime is not None and choices:
            measured = measured_speed(runtime, runtime.site, choices[-1])
        return SiteProfile(
            name=site.name,
            strategy="" if runtime is None else runtime.strategy.name,
            kernel=", ".join(dict.fromkeys(choice.kernel.name for choice in choices)) or "dense",
            tokens=self._tokens(site, calls) if calls else tokens,
            tokens_dense=tokens,
            windows=site.windows,
            density=_density(calls),
            **{name: self._parts(shares[site.name]) for name, shares in self.shares.items()},
            left_dense=runtime is not None and runtime.dense,
            expected=choices[-1].expected if choices else None,
            measured=measured,
        )

    def _tokens(self, site: Site, calls: list[CountedCall]) -> int:
        """Number of queries of one image; the mean if images keep different numbers."""
        rows = sum(call.queries * call.lists for call in calls)
        return round(rows / (site.heads * site.calls * len(self.batch)))

    def profile(
        self, accounting: Accounting, latency: Latency | None, memory: Memory | None
    ) -> Profile:
        """The result as a `Profile`."""
        profile = Profile(
            model=type(self.run.model).__name__,
            backbone=self.module_map.backbone,
            strategy=", ".join(patch.strategy.name for patch in self.run.patches),
            input_shape=tuple(self.batch.shape),
            images=len(self.batch),
            accounting=accounting,
            **{name: self._parts(*shares.values()) for name, shares in self.shares.items()},
            sites=tuple(self._site(site) for site in self.module_map.sites),
            latency=latency,
            memory=memory,
            notes=(),
        )
        return replace(profile, notes=notes(profile))


def _density(calls: list[CountedCall]) -> float:
    pairs = sum(call.all_pairs * call.lists for call in calls)
    return sum(call.pairs * call.lists for call in calls) / pairs if pairs else 1.0
