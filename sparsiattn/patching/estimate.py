"""The expected pattern, kernel and speed of every site, from a dry run."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from sparsiattn.attention.cross_layer_state import CrossLayerState
from sparsiattn.attention.factored_bias import FactoredBias
from sparsiattn.attention.inputs import AttentionInputs
from sparsiattn.attention.pattern import Dense, Pattern
from sparsiattn.attention.site import Site
from sparsiattn.attention.token_order import TokenOrder
from sparsiattn.kernels import tuning_cache
from sparsiattn.kernels.base import Choice, choose
from sparsiattn.kernels.cost import Planning
from sparsiattn.kernels.native import factors
from sparsiattn.kernels.planning_work import planning_of
from sparsiattn.kernels.prices import PLANNING, Work
from sparsiattn.patching.discovery.meta_cache import recalling
from sparsiattn.patching.discovery.meta_model import meta_copy, value_copy
from sparsiattn.patching.dry_run import DryRun
from sparsiattn.patching.flop_counter import mac_counter, macs_of
from sparsiattn.runtime import placement
from sparsiattn.runtime.measured_speed import predicts
from sparsiattn.runtime.patch_state import PatchState
from sparsiattn.runtime.site_runtime import SiteRuntime, notify_planner
from sparsiattn.strategies.base import LearnedPlanner
from sparsiattn.strategies.connectivity import Connectivity


@dataclass(frozen=True, eq=False)
class Expected:
    """What is expected at one site, for one image.

    Attributes:
        pattern: The pattern, usually of meta tensors.
        macs: MACs of the planner.
        planning: The work of choosing the keys.
        choice: The chosen kernel; its expected speed includes planning.
        works: On a GPU, the work of every kernel that takes the call and counts its work, by name.
    """

    pattern: Pattern
    macs: int
    planning: Planning
    choice: Choice
    works: Mapping[str, Work] = field(default_factory=dict)


def settle_sites(state: PatchState, run: DryRun | None, only_if_faster: bool) -> None:
    """Choose the kernel of every site before the model is changed.

    Args:
        state: The patch, not installed yet.
        run: The dry run, for a patch with a token strategy.
        only_if_faster: Whether a site stays dense if its best kernel, including planning and
            Python's overhead, is not expected to beat dense attention.

    Raises:
        KernelRefused: The kernel that the user named refuses one of the sites.
    """
    if state.kernel != "auto":  # check every site before any is set to dense
        deque(expect_all(state, run), maxlen=0)
    for runtime, expected in expect_all(state, run) if only_if_faster else ():
        runtime.dense = not expected.choice.pays


def expect_all(state: PatchState, run: DryRun | None) -> Iterator[tuple[SiteRuntime, Expected]]:
    """What is expected at each site, in the order in which sites store tensors for each other.

    A site that the caller marks as dense during the iteration stores none.
    """
    cross_layer = CrossLayerState(state.key)
    for runtime in state.runtimes:
        changed = cross_layer.copy()
        changed.forgets = runtime.site.calls > 1 and not runtime.site.packed
        yield runtime, expect(runtime, run, changed)
        if not (runtime.dense or changed.forgets):
            cross_layer = changed


def expect(
    runtime: SiteRuntime, run: DryRun | None, cross_layer: CrossLayerState | None = None
) -> Expected:
    """What is expected at a site at patch-time shapes, computed without data.

    Args:
        runtime: The site.
        run: The dry run, for a patch with a token strategy.
        cross_layer: The tensors that earlier sites stored.
    """
    inputs, planner = dry_site(runtime, run), runtime.planner
    if runtime.strategy.uses_cross_layer_state:
        inputs = inputs.replace(cross_layer=cross_layer or CrossLayerState())
    if isinstance(planner, LearnedPlanner):
        planner.note_weights()
    if isinstance(planner, nn.Module):
        planner = meta_copy(planner) if inputs.q.is_meta else value_copy(planner)
    planned: Pattern = Pattern.dense(inputs.n_queries, inputs.n_keys)
    with torch.no_grad(), mac_counter() as counter:
        if not runtime.strategy.keeps_all(inputs.n_keys):
            planned = planner(inputs)
        pattern = runtime.finish(planned, inputs)
        output = inputs.q.new_empty(*inputs.q.shape[:-1], inputs.v.shape[-1])
        notify_planner(planner, inputs, output)
    macs = macs_of(counter)
    if isinstance(pattern, Dense):
        return Expected(pattern, macs, Planning(Work(), 1), Choice(runtime.kernels[0], (), 1.0))
    planning = planning_of(planned, macs, inputs)
    with recalling():  # a kernel may access key lists, which are computed only then
        choice = choose(runtime.kernels, inputs, pattern, explicit=runtime.explicit)
        works = _works(runtime, choice, inputs, pattern) if inputs.device.type == "cuda" else {}
    return Expected(pattern, macs, planning, choice.after(planning), works)


def _works(
    runtime: SiteRuntime, choice: Choice, inputs: AttentionInputs, pattern: Pattern
) -> dict[str, Work]:
    refused = {name for name, _ in choice.refusals}
    works = {
        kernel.name: kernel.work(inputs, pattern)
        for kernel in runtime.kernels
        if kernel.name not in refused
    }
    return {name: work for name, work in works.items() if work is not None}


def site_at(site: Site, run: DryRun | None) -> Site:
    """The site with the number of tokens that reaches it."""
    if run is None or site.name not in run.inputs:
        return site
    inputs = run.inputs[site.name]
    if inputs.n_queries == site.tokens:
        return site
    grid = (1, inputs.n_queries - site.prefix_tokens)
    return replace(site, tokens=inputs.n_queries, keys=inputs.n_keys, grid=grid, key_grid=grid)


def dry_site(runtime: SiteRuntime, run: DryRun | None) -> AttentionInputs:
    """The operands of one image at a site, in the host's dtype and for its device.

    They are meta tensors, unless the dry run ran with values.
    """
    site, strategy = site_at(runtime.site, run), runtime.strategy
    views = site.views if site.grid == site.key_grid and site.grid[0] > 1 else 1
    tile = strategy.tile_for(runtime.site.tokens, views)
    depth = strategy.depth_for(views) if tile != 1 else 1
    module = runtime.planner if isinstance(runtime.planner, nn.Module) else runtime.module
    like = next((p for p in module.parameters() if p.is_floating_point()), None)
    like = next(runtime.module.parameters(), None) if like is None else like
    dtype = like.dtype if like is not None and like.is_floating_point() else torch.float32
    reached = None if run is None else run.inputs.get(site.name)

    device = torch.device("meta") if reached is None else reached.q.device

    def empty(rows: int, width: int) -> Tensor:
        return torch.zeros(site.windows, site.heads, rows, width, device=device, dtype=dtype)

    return AttentionInputs(
        empty(site.tokens, site.head_dim),
        empty(site.keys, site.head_dim),
        empty(site.keys, site.value_dim),
        site.head_dim**-0.5,
        _dry_bias(runtime, site, empty),
        site,
        tile=tile,
        block=strategy.block_for(site.keys, tile, views),
        token_state=None if reached is None else reached.token_state,
        target_device=None if like is None else placement.device_of(like),
        views=site.views // depth if depth > 1 else 0,
        order=TokenOrder(site.tokens, depth=depth) if depth > 1 else None,
    )


def _dry_bias(
    runtime: SiteRuntime, site: Site, empty: Callable[[int, int], Tensor]
) -> Tensor | None:
    """The host's bias; its factors, if compiled code will get these."""
    if site.bias == "none":
        return None
    if runtime.sums_bias and site.key_grid[0] * site.key_grid[1] == site.keys:
        rows, columns = (empty(site.tokens, side) for side in site.key_grid)
        weight = next(runtime.module.parameters(), None)
        on_cpu = weight is not None and weight.device.type == "cpu"
        if on_cpu and factors.serves(rows.unsqueeze(-1), columns.unsqueeze(-2)):
            return FactoredBias(rows, columns)
    return empty(site.tokens, site.keys)


def measured_speed(runtime: SiteRuntime, site: Site, choice: Choice) -> float | None:
    """Speed of such a call as `measure_sites` or else `tune` measured it; None if neither did."""
    measured = runtime.measured
    if measured is not None and measured.holds_for(choice, runtime.planner):
        return measured.ratio
    return tuned_ratio(runtime, site, choice)


def tuned_ratio(runtime: SiteRuntime, site: Site, choice: Choice) -> float | None:
    """Speed of planning and kernel relative to dense attention, as `tune` measured it.

    None if `tune` did not measure this shape, budget and tile, or if a predictor ranks the keys.
    """
    call, strategy = choice.call, runtime.strategy
    if predicts(runtime.planner):
        return None
    if call is None or not isinstance(strategy, Connectivity) or site.windows > 1:
        return None
    if site.prefix_tokens != 1 or site.bias != "none" or call.dim != call.value_dim:
        return None
    entry = None if call.device.type == "meta" else tuning_cache.find(call.device, call.dtype)
    if entry is None:
        return None
    with_tile = replace(strategy, tile=strategy.tile_for(site.tokens))
    shape = (call.queries - 1, call.keys - 1, call.heads, call.dim, call.batch)
    rows = (row for row in entry["rows"] if _is_case(row["case"], shape, with_tile))
    ratios = {row["kernel"]: row["ratio"] for row in rows}
    if PLANNING not in ratios or choice.kernel.name not in ratios:
        return None
    return 1.0 / (1.0 / ratios[PLANNING] + 1.0 / ratios[choice.kernel.name])  # type: ignore[no-any-return]


def _is_case(case: dict[str, Any], shape: tuple[int, ...], strategy: Connectivity) -> bool:
    if case["k"] is None:
        return False
    tokens, tile = case["tokens"], case["tile"]
    same = (tokens, tokens, case["heads"], case["dim"], case["batch"]) == shape
    tile = tile if isinstance(tile, int) else tuple(tile)
    return same and strategy == Connectivity(k=case["k"], tile=tile)
