"""Data and models that the tests of training share."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

import sparsiattn
from sparsiattn.testing import tiny_vit
from sparsiattn.training import Recipe, Stage

Batch = tuple[torch.Tensor, torch.Tensor]
DISTIL = {"ce": 1.0, "kl": 0.5, "token_mse": 0.5}


def batches(count: int = 4, size: int = 4, seed: int = 3) -> list[Batch]:
    """Images whose label shows: one channel is brighter in some, one darker in others."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        labels = torch.randint(0, 5, (size,), generator=generator)
        images = torch.randn(size, 3, 32, 32, generator=generator)
        images[torch.arange(size), labels % 3] += torch.where(labels < 3, 1.0, -1.0)[:, None, None]
        found.append((images, labels))
    return found


def one_stage(**fields: Any) -> Recipe:
    return Recipe(stages=(Stage(**{"epochs": 1, "ce": 1.0, **fields}),))


def two_stages(**fields: Any) -> Recipe:
    first = Stage(name="predictor", trainable="planners", epochs=2, lr=1e-2, reconstruction=1.0)
    second = Stage(name="backbone", epochs=2, lr=1e-3, **DISTIL)
    return Recipe(stages=(first, second), **fields)


def patched(strategy: str = "connectivity", host: Any = None, **options: Any) -> nn.Module:
    """A tiny ViT; connectivity starts as badly as can be, so that there is much to learn."""
    model = tiny_vit(**(host or {}))
    live = sparsiattn.patch(model, strategy, **options or {"k": 0.2})
    generator = torch.Generator().manual_seed(4)
    for runtime in live.runtimes if live.has_learned_planners else ():
        up: Any = runtime.planner.up  # type: ignore[attr-defined]
        up.data.copy_(torch.rand(up.shape, generator=generator))
    return model


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return copy.deepcopy(dict(model.state_dict()))


def changed(model: nn.Module, before: dict[str, torch.Tensor]) -> set[str]:
    """Names of the weights that are not what they were, ``planners`` for all of those."""
    names = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    return {"planners" if ".sparsiattn." in name else "backbone" for name in names}


def losses(result: Any) -> list[float]:
    return [row["loss"] for row in result.history if "loss" in row]


def epochs(result: Any) -> list[float]:
    return [row["epoch_loss"] for row in result.history if "epoch_loss" in row]
