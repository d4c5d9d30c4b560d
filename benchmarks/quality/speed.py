"""A whole model dense, patched, and without attention, in the same paired rounds."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sparsiattn
from sparsiattn.runtime.timing import Timing, alternate


@contextmanager
def values_only() -> Iterator[None]:
    """Attention returns its values: what a model costs whose attention is free."""
    sdpa = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = lambda q, k, v, *args, **kwargs: v  # type: ignore[assignment]
    try:
        yield
    finally:
        F.scaled_dot_product_attention = sdpa


@torch.inference_mode()
def measure(model: nn.Module, images: Tensor, line: dict[str, Any], rounds: int) -> dict[str, Any]:
    """Dense time over patched time, and over the time without attention, as JSON."""
    # all three run on the same memory of weights
    other = copy.deepcopy(model, {id(weight): weight for weight in model.parameters()})

    def free() -> None:
        with values_only():
            model(images)

    with sparsiattn.patch(other, **line) as patch:
        patch.warmup(images)
        calls = {"dense": lambda: model(images), "patched": lambda: other(images), "free": free}
        times = alternate(calls, rounds)
        about = settings(patch)
    ratio = Timing.of(times["patched"], times["dense"]).to_dict()
    limit = Timing.of(times["free"], times["dense"]).to_dict()
    return {
        "ratio": ratio["ratio"], "ratio_quartiles": ratio["ratio_quartiles"],
        "limit": limit["ratio"], "limit_quartiles": limit["ratio_quartiles"],
        "dense_ms": ratio["second_ms"], "patched_ms": ratio["first_ms"],
        "free_ms": limit["first_ms"], "rounds": rounds, **about,
    }  # fmt: skip


def settings(patch: sparsiattn.Patch) -> dict[str, Any]:
    """What the last forward pass did, by the patch's own report."""
    sites = [site for site in patch.report().sites if site.ran]
    densities = [site.density for site in sites if site.density is not None]
    return {
        "density": round(max(densities), 4) if densities else None,
        "kernels": sorted({site.kernel for site in sites}),
        "tiles": sorted({str(site.tile) for site in sites}),
    }
