"""A whole model dense, patched, and without attention, in the same paired rounds."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sparsiattn
from quality.variants import Line, Variant, variant
from sparsiattn.analysis.profiling.memory import peak_bytes
from sparsiattn.patching.flop_counter import flop_counter
from sparsiattn.runtime.timing import Timing, alternate


def without_attention(model: nn.Module, *args: Any, **options: Any) -> Any:
    """Fused attention returns its values: what a model costs whose attention is free."""
    with mock.patch.object(F, "scaled_dot_product_attention", lambda q, k, v, *_, **__: v):
        return model(*args, **options)


@torch.inference_mode()
def measure(model: nn.Module, images: Tensor, rounds: int, line: Line) -> dict[str, Any]:
    """Dense time over the line's time, and over the time without attention, as JSON."""
    with variant(model, line) as made:
        given = made.images(images)
        if made.patch is not None:
            made.patch.warmup(given)
        other = torch.compile(made.model) if "quantize" in line else made.model
        calls = {
            "dense": lambda: model(images),
            "patched": lambda: other(given),
            "free": lambda: without_attention(model, images),
        }
        times = alternate(calls, rounds)
        about = settings(made.patch) | {"macs": macs(made, given) // len(images)}
        peak = {"peak_bytes": peak_bytes(lambda: made.model(given), images.device)}
    dense = times["dense"]
    return {
        "patched": Timing.of(times["patched"], dense).to_dict(),
        "limit": Timing.of(times["free"], dense).to_dict(),
        **about,
        **peak,
    }


def macs(made: Variant, images: Tensor) -> int:
    """Multiply-accumulates of a call, by torch's counter, by the report where there is a patch."""
    counted = None if made.patch is None else made.patch.report().macs
    if counted is not None:
        return counted * len(images)
    with flop_counter() as counter:
        made.model(images)
    return int(counter.get_total_flops()) // 2


def settings(patch: sparsiattn.Patch | None) -> dict[str, Any]:
    """What the last forward pass did, by the patch's own report."""
    if patch is None:
        return {}
    sites = [site for site in patch.report().sites if site.ran]
    densities = [site.density for site in sites if site.density is not None]
    return {
        "density": round(max(densities), 4) if densities else None,
        "kernels": sorted({site.kernel for site in sites}),
        "tiles": sorted({str(site.tile) for site in sites}),
    }
