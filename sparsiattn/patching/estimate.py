"""What every site is expected to do, from a dry run: its pattern, its kernel, and at what speed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparsiattn.attention.cross_layer_state import CrossLayerState
from sparsiattn.attention.inputs import AttentionInputs
from sparsiattn.attention.pattern import Dense, Pattern, Ranked
from sparsiattn.attention.site import Site
from sparsiattn.kernels import cost
from sparsiattn.kernels.base import Choice, choose
from sparsiattn.kernels.cost import Call, Planning, Work
from sparsiattn.patching.discovery.probe import meta_copy
from sparsiattn.patching.dry_run import DryRun, dry_run, mac_counter
from sparsiattn.runtime.site_runtime import SiteRuntime, notify_planner

if TYPE_CHECKING:
    from sparsiattn.runtime.handle import Patch


@dataclass(frozen=True, eq=False)
class Expected:
    """One image at one site: its pattern without data, the planner's MACs, what planning does, and
    the kernel with planning counted in its expected speed."""

    pattern: Pattern
    macs: int
    planning: Planning
    choice: Choice


def leave_slow_sites_dense(handle: Patch) -> None:
    """Mark the sites whose best kernel, planning paid, is not expected to beat dense attention."""
    run = dry_run(handle, counted=False) if handle.blocks else None
    for runtime, found in expect_all(handle, run):
        runtime.dense = found.choice.expected < 1.0


def refuse_early(handle: Patch) -> None:
    """Raise `KernelRefused` now if the kernel asked for by name cannot serve one of the sites."""
    run = dry_run(handle, counted=False) if handle.blocks else None
    for _ in expect_all(handle, run):
        continue


def expect_all(handle: Patch, run: DryRun | None) -> Iterator[tuple[SiteRuntime, Expected]]:
    """What each site does, in the order in which they leave each other notes; one that is marked
    dense meanwhile leaves none."""
    notes = CrossLayerState(handle.key)
    for runtime in handle.runtimes:
        given = notes.copy()
        given.forgets = runtime.site.calls > 1
        yield runtime, expect(runtime, run, given)
        if not (runtime.dense or given.forgets):
            notes = given


def expect(
    runtime: SiteRuntime, run: DryRun | None, notes: CrossLayerState | None = None
) -> Expected:
    """What a site does at patch-time shapes, found without data. notes: those of earlier sites."""
    inputs, planner = dry_site(runtime, run), runtime.planner
    if runtime.strategy.uses_cross_layer_state:
        inputs = inputs.replace(cross_layer=CrossLayerState() if notes is None else notes)
    if isinstance(planner, torch.nn.Module):
        planner = meta_copy(planner)
    wish: Pattern = Pattern.dense(inputs.n_queries, inputs.n_keys)
    with torch.no_grad(), mac_counter() as counter:
        if not runtime.strategy.keeps_all(inputs.n_keys):
            wish = planner(inputs)
        pattern = runtime.finish(wish, inputs)
        notify_planner(
            planner, inputs, inputs.q.new_empty(*inputs.q.shape[:-1], inputs.v.shape[-1])
        )
    macs = int(counter.get_total_flops()) // 2
    if isinstance(pattern, Dense):
        return Expected(pattern, macs, Planning(Work(), 1), Choice(runtime.kernels[0], (), 1.0))
    planning = planning_of(wish, macs, inputs)
    choice = choose(runtime.kernels, inputs, pattern, explicit=runtime.explicit)
    return Expected(pattern, macs, planning, choice.after(planning))


def planning_of(wish: Pattern, macs: int, inputs: AttentionInputs) -> Planning:
    """What choosing the keys of one call does, if a planner answered so after that many MACs."""
    scores = wish.scores.numel() if isinstance(wish, Ranked) else 0
    return cost.planning(macs, scores, Call.of(inputs))


def site_at(site: Site, run: DryRun | None) -> Site:
    """The site with the tokens that reach it."""
    if run is None or site.windows > 1 or site.name not in run.inputs:
        return site
    inputs = run.inputs[site.name]
    if inputs.n_queries == site.tokens:
        return site
    grid = (1, inputs.n_queries - site.prefix_tokens)
    return replace(site, tokens=inputs.n_queries, keys=inputs.n_keys, grid=grid, key_grid=grid)


def dry_site(runtime: SiteRuntime, run: DryRun | None) -> AttentionInputs:
    """One image's operands at a site, without data, in the host's dtype and for its device."""
    site, strategy = site_at(runtime.site, run), runtime.strategy
    module = runtime.planner if isinstance(runtime.planner, torch.nn.Module) else runtime.module
    like = next((p for p in module.parameters() if p.is_floating_point()), None)
    like = next(runtime.module.parameters(), None) if like is None else like
    dtype = like.dtype if like is not None and like.is_floating_point() else torch.float32

    def empty(rows: int, width: int) -> Tensor:
        return torch.empty(site.windows, site.heads, rows, width, device="meta", dtype=dtype)

    return AttentionInputs(
        empty(site.tokens, site.head_dim),
        empty(site.keys, site.head_dim),
        empty(site.keys, site.value_dim),
        site.head_dim**-0.5,
        None if site.bias == "none" else empty(site.tokens, site.keys),
        site,
        tile=strategy.tile_for(site.tokens),
        block=strategy.block_for(site.keys),
        token_state=None
        if run is None or site.name not in run.inputs
        else run.inputs[site.name].token_state,
        target_device=None if like is None else like.device,
    )
