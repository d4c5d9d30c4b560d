"""What runs a model to measure it leaves the model's own cached tables fit for training."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import pytest
import torch
from timm import models
from torch import Tensor, nn

import sparsiattn
from sparsiattn.training import evaluate
from tests.support import zoo


@lru_cache
def places(count: int) -> Tensor:
    """A table that is kept for good, as that of BEiT in transformers."""
    return torch.arange(count)


class Caching(models.VisionTransformer):
    def __init__(self) -> None:
        super().__init__(**zoo.TINY)
        self.extra = nn.Parameter(torch.randn(80, 48))

    def _pos_embed(self, x: Tensor) -> Tensor:
        x = super()._pos_embed(x)
        return x + self.extra[places(x.shape[1])]


IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
LABELLED = [(IMAGES, torch.tensor([0, 1, 2, 3]))]


def patched(run: Callable[[nn.Module], Any]) -> Callable[[nn.Module], None]:
    """The same on a patched model, which has run dry when it was patched."""

    def run_patched(model: nn.Module) -> None:
        with sparsiattn.patch(model, "topk", k=0.5):
            places.cache_clear()
            run(model)

    return run_patched


RUNS: dict[str, Callable[[nn.Module], Any]] = {
    "bench": patched(lambda model: sparsiattn.bench(model, IMAGES, rounds=1)),
    "profile": patched(lambda model: sparsiattn.profile(model, IMAGES, rounds=1)),
    "show": patched(lambda model: sparsiattn.show(model, IMAGES[:1])),
    "evaluate": patched(lambda model: evaluate(model, LABELLED)),
    "evaluate, not patched": lambda model: evaluate(model, LABELLED),
    "recommend": lambda model: sparsiattn.recommend(model, IMAGES, speedup=1.1, budget_s=1),
    "search": lambda model: sparsiattn.search(model, IMAGES, {"macs": 0.95}, trials=2),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_table_that_was_made_meanwhile_serves_a_training_step(name: str) -> None:
    places.cache_clear()
    model = Caching().eval()
    RUNS[name](model)
    assert places.cache_info().currsize
    model.train()(IMAGES).square().sum().backward()
    assert model.extra.grad is not None
    assert torch.isfinite(model.extra.grad).all()
