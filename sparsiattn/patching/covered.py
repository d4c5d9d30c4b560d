"""Ratios that `tune` measured, where a site is just such a call."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from sparsiattn.attention.site import Site
from sparsiattn.kernels import tuning_cache as tuningfile
from sparsiattn.kernels.base import Choice
from sparsiattn.kernels.cost import PLANNING
from sparsiattn.runtime.site_runtime import SiteRuntime
from sparsiattn.strategies.connectivity import Connectivity


def tuned_ratio(runtime: SiteRuntime, site: Site, choice: Choice) -> float | None:
    """Speed of planning and kernel relative to dense attention as `tune` measured it for this very
    shape, budget and tile; None if it measured no such call."""
    call, strategy = choice.call, runtime.strategy
    if call is None or not isinstance(strategy, Connectivity) or site.windows > 1:
        return None
    if site.prefix_tokens != 1 or site.bias != "none" or call.dim != call.value_dim:
        return None
    entry = None if call.device.type == "meta" else tuningfile.find(call.device, call.dtype)
    if entry is None:
        return None
    plain = replace(strategy, tile=strategy.tile_for(site.tokens))
    shape = (call.queries - 1, call.keys - 1, call.heads, call.dim, call.batch)
    ratios = {
        row["kernel"]: row["ratio"] for row in entry["rows"] if _is(row["case"], shape, plain)
    }
    if PLANNING not in ratios or choice.kernel.name not in ratios:
        return None
    return 1.0 / (1.0 / ratios[PLANNING] + 1.0 / ratios[choice.kernel.name])  # type: ignore[no-any-return]


def _is(case: dict[str, Any], shape: tuple[int, ...], strategy: Connectivity) -> bool:
    if case["k"] is None:
        return False
    tokens, tile = case["tokens"], case["tile"]
    same = (tokens, tokens, case["heads"], case["dim"], case["batch"]) == shape
    tile = tile if isinstance(tile, int) else tuple(tile)
    return same and strategy == Connectivity(k=case["k"], tile=tile)
