"""The expected speed of the whole model, and alternatives if it would be slower than dense."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from sparsiattn.attention.site import Site
from sparsiattn.kernels import cost
from sparsiattn.patching.alternatives import in_windows, pays_if_larger, window_line
from sparsiattn.patching.break_even import MOST_IMAGES, images_needed
from sparsiattn.patching.dry_run import DryRun, dry_run
from sparsiattn.patching.estimate import Expected, expect, expect_all, site_at
from sparsiattn.patching.report_lines import SLOWER, estimated_from, loses_time
from sparsiattn.runtime import placement
from sparsiattn.runtime.patch_state import PatchState
from sparsiattn.runtime.site_runtime import SiteRuntime

SITE_MACS = round(cost.SITE_SECONDS / 1.5e-11)
"""MACs that linear layers compute on two server cores in the time that Python takes at a site."""


def model_speed(
    state: PatchState,
    run: DryRun | None,
    dense: int,
    speeds: Mapping[str, float],
    sparse: int,
) -> float:
    """Speed of the whole model relative to dense, assuming that time is proportional to MACs.

    Args:
        state: The patch.
        run: The dry run with MACs counted, for a patch with a token strategy.
        dense: MACs of the dense model.
        speeds: Speed of attention by site name. Sites that are missing or 0 (unknown) count as
            dense.
        sparse: Number of sites whose attention is not the host's own.
    """
    attention = 0.0
    for site in state.model_sites:
        macs = site_at(site, run).macs
        attention += macs / (speeds.get(site.name) or 1.0)
    if state.runs_on_cpu:  # other devices run asynchronously, while Python runs ahead
        attention += SITE_MACS * sparse
    return dense / (other_macs(state, run, dense) + attention)


def other_macs(state: PatchState, run: DryRun | None, dense: int) -> int:
    """MACs of everything except attention and planning; arguments as in `model_speed`."""
    if run is None:
        return dense - sum(site.macs for site in state.model_sites)
    return run.macs - run.planning - sum(site_at(site, run).macs for site in state.model_sites)


def note_speed(state: PatchState) -> None:
    """Set the patch's `speed_note` if it is expected to be slower than the dense model.

    The estimate is for one image at patch-time size, and uses one site of each kind. There is no
    note if the user named a kernel, or on a CPU in half precision before `tune`, where prices are
    only a guess.
    """
    state.speed_note, dense = "", state.attention.macs
    sparse = [r for r in state.runtimes if not (r.dense or r.strategy.keeps_all(r.site.keys))]
    if not (sparse and dense) or state.only_if_faster or state.kernel != "auto":
        return
    if not _is_priced(state.model):
        return
    try:
        run = dry_run(state) if state.blocks else None
        sites = dict(_expected(state, sparse, run))
    except Exception:  # planners of plug-ins may need values; `report` raises the error
        return
    if run is not None and run.ragged:
        return
    speeds = {name: site.choice.expected for name, site in sites.items()}
    speed = model_speed(state, run, dense, speeds, len(speeds))
    if speed < SLOWER:
        slow = {name: site for name, site in sites.items() if site.choice.expected < SLOWER}
        origin = estimated_from(_weight(state.model))
        state.speed_note = loses_time(speed, instead(state, slow or sites), origin)


def _is_priced(model: nn.Module) -> bool:
    """Whether prices for the model's device and dtype are measured, or published for a GPU."""
    like = _weight(model)
    if like is None:
        return False
    device = placement.device_of(like)
    shipped = device.type == "cuda" or (device.type == "cpu" and like.dtype == torch.float32)
    return shipped or cost.is_tuned(device, like.dtype)


def _weight(model: nn.Module) -> torch.Tensor | None:
    return next((p for p in model.parameters() if p.is_floating_point()), None)


def _expected(
    state: PatchState, sparse: Sequence[SiteRuntime], run: DryRun | None
) -> Iterator[tuple[str, Expected]]:
    """What is expected at every sparse site, by name; computed once per kind of site."""
    if any(runtime.strategy.uses_cross_layer_state for runtime in sparse):
        for runtime, expected in expect_all(state, run):
            yield runtime.site.name, expected
        return
    asked: list[tuple[object, Expected]] = []
    for runtime in sparse:
        kind = _kind(runtime, run)
        known = next((expected for other, expected in asked if other == kind), None)
        if known is None:
            known = expect(runtime, run)
            asked.append((kind, known))
        yield runtime.site.name, known


def _kind(runtime: SiteRuntime, run: DryRun | None) -> object:
    """Everything that the speed of a site depends on, without its name and index."""
    site = replace(site_at(runtime.site, run), name="", index=0)
    return site, runtime.strategy, type(runtime.planner)


def instead(state: PatchState, sites: Mapping[str, Expected]) -> list[str]:
    """What to do instead if the patched model is slower than the dense one.

    Args:
        state: The patch.
        sites: What is expected of sites that are slower than dense, as expected or as measured.
    """
    slow = [r for r in state.runtimes if r.site.name in sites]
    choices = [site.choice for site in sites.values()]
    refusals = [why for choice in choices for _, why in choice.refusals]
    advice: list[str] = []
    if state.tokens is None and in_windows(state.sites):
        advice += filter(None, [window_line(state.model_sites, state.model, state.map_size)])
    if any("patch.warmup" in reason for why in refusals for reason in why):
        advice.append("patch.warmup(images), which compiles kernels")
    if state.tokens is None and _can_shorten(state.model_sites):
        advice += ["strategy='token_drop'", "strategy='token_merge'"]
    advice += _larger_batches(sites.values())
    if slow and pays_if_larger(slow[0]):
        advice.append("larger images")
    would_stay_dense = [not choice.pays for choice in choices]
    if all(would_stay_dense):
        advice.append("only_if_faster=True")
    elif any(would_stay_dense) or any(runtime.measured is not None for runtime in slow):
        advice.append("only_if_faster=True after tune()")
    return advice


def _larger_batches(sites: Iterable[Expected]) -> list[str]:
    """On a GPU, the batch size from which on these sites beat dense attention, if one does."""
    images = 0
    for site in sites:
        call, needed = site.choice.call, images_needed(site)
        if call is None or call.device.type != "cuda" or needed is None:
            return []
        images = max(images, math.ceil(needed[1]))
    return [f"batches of {images} images or more"] if 1 < images <= MOST_IMAGES else []


def _can_shorten(sites: Sequence[Site]) -> bool:
    """Whether one sequence of patches runs through the whole model, so that tokens can leave it."""
    first = sites[0]
    return all(
        (site.tokens, site.keys, site.grid) == (first.tokens, first.tokens, first.grid)
        and (site.windows, site.calls, site.halo) == (1, 1, 0)
        and site.placed
        and site.of_image
        and not site.reordered
        for site in sites
    )
