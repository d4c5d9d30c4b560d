"""A whole model dense, patched, and without attention, in the same paired rounds."""

from __future__ import annotations

import copy
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sparsiattn
from sparsiattn.runtime.timing import Timing, alternate


def without_attention(model: nn.Module, images: Tensor) -> Tensor:
    """Fused attention returns its values: what a model costs whose attention is free."""
    with mock.patch.object(F, "scaled_dot_product_attention", lambda q, k, v, **_: v):
        return model(images)  # type: ignore[no-any-return]


@torch.inference_mode()
def measure(model: nn.Module, images: Tensor, line: dict[str, Any], rounds: int) -> dict[str, Any]:
    """Dense time over patched time, and over the time without attention, as JSON."""
    # all three run on the same memory of weights
    other = copy.deepcopy(model, {id(weight): weight for weight in model.parameters()})
    with sparsiattn.patch(other, **line) as patch:
        patch.warmup(images)
        calls = {
            "dense": lambda: model(images),
            "patched": lambda: other(images),
            "free": lambda: without_attention(model, images),
        }
        times = alternate(calls, rounds)
        about = settings(patch)
    dense = times["dense"]
    return {
        "patched": Timing.of(times["patched"], dense).to_dict(),
        "limit": Timing.of(times["free"], dense).to_dict(),
        **about,
    }


def settings(patch: sparsiattn.Patch) -> dict[str, Any]:
    """What the last forward pass did, by the patch's own report."""
    sites = [site for site in patch.report().sites if site.ran]
    densities = [site.density for site in sites if site.density is not None]
    return {
        "density": round(max(densities), 4) if densities else None,
        "kernels": sorted({site.kernel for site in sites}),
        "tiles": sorted({str(site.tile) for site in sites}),
    }
