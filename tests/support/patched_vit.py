"""A small ViT, patched with strategies of every kind, and images for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import sparsiattn
from sparsiattn import Patch
from tests.support import zoo

STRATEGIES: dict[str, dict[str, Any]] = {
    "connectivity": {"k": 0.25},
    "topk": {"k": 0.25, "background": 2},
    "token_drop": {"keep": 0.5, "layers": [1]},
    "token_merge": {"r": 4},
    "hybrid": {"k": 0.25, "keep": 0.5, "layers": [1], "only_if_faster": False},
}


@contextmanager
def patched(strategy: str, model: nn.Module | None = None) -> Iterator[tuple[Any, Patch]]:
    model = zoo.build("vit") if model is None else model
    with sparsiattn.patch(model, strategy, **STRATEGIES[strategy]) as live:
        yield model, live


def images(count: int = 2) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))
