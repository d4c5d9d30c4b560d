"""How often the true match of a patch in another view is among the keys that a strategy keeps."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from sparsiattn import AttentionInputs, Site
from sparsiattn.attention.structure import Structure
from sparsiattn.strategies import Strategy, finish

SCALES = (4.0, 8.0, 16.0, 32.0, 64.0)
ROWS = 512  # queries at once


def descriptors(model: Any, images: Tensor) -> Tensor:
    """Centred and normalised patch features of all views, ``[1, 1, V * n, C]``."""
    tokens = torch.cat([model.forward_features(image[None]) for image in images])
    patches = tokens[:, model.num_prefix_tokens :].flatten(0, 1)
    patches = patches - patches.mean(0)
    return torch.nn.functional.normalize(patches, dim=-1)[None, None]


def best_scale(features: Tensor, matches: Tensor) -> float:
    """The factor of QK^T under which the true matches get the largest share of attention."""
    return max(SCALES, key=lambda scale: mean_log_mass(features, matches, scale))


def mean_log_mass(features: Tensor, matches: Tensor, scale: float) -> float:
    """Mean log of the attention weights of true matches."""
    total, count, keys = 0.0, 0, features[0, 0]
    for rows, wanted in zip(keys.split(ROWS), matches.split(ROWS), strict=True):
        weights = (scale * rows @ keys.T).log_softmax(-1).gather(1, wanted.clamp_min(0))
        total += weights[wanted >= 0].sum().item()
        count += int((wanted >= 0).sum())
    return total / count


def inputs_of(features: Tensor, views: int, strategy: Strategy, scale: float) -> AttentionInputs:
    """One global layer over the patches of all views."""
    n = features.shape[-2]
    side = math.isqrt(n // views)
    structure = Structure((side, side), views=views, source="benchmark")
    site = Site.of(features, features, features).described(structure)
    tile, block = strategy.tile_for(n), strategy.block_for(n)
    operands = features, features, features
    return AttentionInputs(*operands, scale, None, site, tile=tile, block=block)


def kept(inputs: AttentionInputs, strategy: Strategy) -> Tensor:
    """Keys that every query keeps, ``[1, 1, N, N]``."""
    pattern = strategy.planner(inputs.site)(inputs)
    background = strategy.background_for(inputs.key_grid, inputs.key_views)
    return finish(pattern, inputs, background=background).to_mask()


def recall(mask: Tensor, matches: Tensor) -> dict[str, Any]:
    """The share of true matches that are kept, and the share of all keys.

    Args:
        mask: ``[1, 1, N, N]``.
        matches: ``[N, V]``, -1 where a patch has no match in a view, and in its own view.
    """
    rows = mask.expand(1, 1, len(matches), -1)[0, 0]
    found = rows.gather(1, matches.clamp_min(0))[matches >= 0]
    return {
        "recall": found.double().mean().item(),
        "density": rows.double().mean().item(),
        "matches": found.numel(),
    }


def others(matches: Tensor) -> Tensor:
    """``[V, n, V]`` as ``[V * n, V]``, without the matches of patches in their own view."""
    own = torch.eye(len(matches), dtype=torch.bool)[:, None]
    return matches.masked_fill(own, -1).flatten(0, 1)


def mean(rows: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Over scenes, each weighing the same."""
    listed = list(rows)
    names = ("recall", "density")
    return {
        **{name: round(sum(row[name] for row in listed) / len(listed), 4) for name in names},
        "matches": sum(row["matches"] for row in listed),
    }
