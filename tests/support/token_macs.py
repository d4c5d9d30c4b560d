"""MACs of a DeiT whose tokens become fewer, in closed form."""

from __future__ import annotations

from functools import cache
from typing import Any

import timm
from torch import nn

import sparsiattn

WIDTH = {"tiny": 192, "small": 384, "base": 768}
LAYERS = 12


@cache
def deit(size: str) -> nn.Module:
    return timm.create_model(f"deit_{size}_patch16_224").eval()


def closed(c: int, entering: list[int], leaving: list[int]) -> int:
    """Patches, attention at the tokens that enter a block, MLP at those that leave it, head."""
    total = 196 * 768 * c + 1000 * c
    for n, m in zip(entering, leaving, strict=True):
        total += 4 * n * c * c + 2 * n * n * c + 8 * m * c * c
    return total


def tokens(reduce: Any) -> tuple[list[int], list[int]]:
    entering, leaving, n = [], [], 197
    for layer in range(LAYERS):
        entering.append(n)
        n = 1 + reduce(layer, n - 1)
        leaving.append(n)
    return entering, leaving


def check(size: str, counts: tuple[list[int], list[int]], report: sparsiattn.Report) -> int:
    """Exact agreement; returns the model's MACs without what choosing tokens costs."""
    c, (entering, leaving) = WIDTH[size], counts
    assert [site.tokens for site in report.sites] == entering
    assert report.mhsa_macs == sum(2 * n * n * c for n in entering)
    assert report.macs is not None
    model = report.macs - report.predictor_macs
    assert model == closed(c, entering, leaving)
    assert report.macs_dense == closed(c, [197] * LAYERS, [197] * LAYERS)
    return model
