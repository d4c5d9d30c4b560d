"""Clusterings of tokens as plain loops, written from the formulas, and what their tests share."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from sparsiattn.strategies import TokenInputs
from sparsiattn.testing import random_inputs


def token_inputs(x: Tensor, grid: tuple[int, int], **fields: Any) -> TokenInputs:
    site = random_inputs(grid).site
    return TokenInputs(x, site, None, 0, 1, grid=grid, **fields)


def partition(label: Any) -> set[frozenset[int]]:
    """Clusters as sets of their members, whatever their labels."""
    groups: dict[int, set[int]] = {}
    for i, cluster in enumerate(label):
        groups.setdefault(int(cluster), set()).add(i)
    return {frozenset(group) for group in groups.values()}


def distances_by_hand(x: Tensor) -> list[list[float]]:
    return [[float((a - b).double().norm()) for b in x] for a in x]


def peaks_by_hand(d: list[list[float]], count: int, k: int) -> list[int]:
    """TCFormer, section 3.2: rho, delta, and the largest of their products."""
    n = range(len(d))
    rho = [math.exp(-sum(v * v for v in sorted(d[i])[:k]) / k) for i in n]
    most = max(v for row in d for v in row if v < math.inf)
    delta = [
        min([most] + [d[i][j] for j in n if (rho[j], -j) > (rho[i], -i)]) for i in n
    ]  # of equals, the first is the denser
    return sorted(sorted(n, key=lambda i: (-rho[i] * delta[i], i))[:count])


def nearest_by_hand(d: list[list[float]], centres: list[int]) -> list[int]:
    return [
        centres.index(i)
        if i in centres
        else min(range(len(centres)), key=lambda c: d[i][centres[c]])
        for i in range(len(d))
    ]


def entering(model: Any, layer: int, x: Tensor) -> Tensor:
    """What the norm before attention gets in a block."""
    seen: list[Tensor] = []
    hook = model.blocks[layer].norm1.register_forward_pre_hook(lambda _, a: seen.append(a[0]))
    model(x)
    hook.remove()
    return seen[0]
