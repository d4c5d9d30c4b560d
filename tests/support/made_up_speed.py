"""A Vision Transformer whose speed and quality are made up, on a clock that only it moves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from timm.models import VisionTransformer
from torch import Tensor

import sparsiattn
from sparsiattn.analysis.recommendation import clock
from sparsiattn.runtime import timing

DEPTH = 2

Options = dict[str, Any]
"""Of a patch, its strategy's name among them; empty for a dense model."""


@dataclass
class World:
    """What the model and its copies share.

    Attributes:
        rule: From a patch to the share of the dense time that it takes, and its quality.
        dense_s: Seconds of a dense pass.
        now: The time.
        passes: The patch of every pass.
    """

    rule: Callable[[Options], tuple[float, float]]
    dense_s: float = 0.5
    now: float = 100.0
    passes: list[Options] = field(default_factory=list)

    def __deepcopy__(self, memo: object) -> World:
        return self

    def perf_counter(self) -> float:
        return self.now

    def spend(self, options: Options, side: float) -> float:
        """Let the time of a pass go by; returns its quality."""
        share, quality = self.rule(options) if options else (side**2, 0.9 + 0.1 * side)
        self.now += share * self.dense_s
        self.passes.append(options)
        return quality


class MadeUp(VisionTransformer):  # type: ignore[misc]
    """Its blocks are real; all it answers is its quality."""

    def __init__(self, world: World) -> None:
        options = {"img_size": 32, "patch_size": 4, "embed_dim": 12, "num_heads": 1, "depth": DEPTH}
        super().__init__(**options, num_classes=5, mlp_ratio=1.0)
        self.world = world

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        answer = super().forward(x, **options)
        if answer.is_meta:
            return answer
        return torch.full_like(answer, self.world.spend(options_of(self), x.shape[-1] / 32))


def quality_said(dense: Tensor, patched: Tensor) -> Tensor:
    """A metric: what the patched model answered."""
    return patched[:, 0]


def options_of(model: torch.nn.Module) -> Options:
    """What a model is patched with."""
    patch = sparsiattn.patch_of(model)
    if patch is None:
        return {}
    saved = patch.strategy.to_dict()
    return {"strategy": saved["name"], **saved["options"]}


def on_its_own_clock(
    monkeypatch: pytest.MonkeyPatch, rule: Callable[[Options], tuple[float, float]]
) -> World:
    """A world whose time is that of budgets and timings, until the patcher undoes it."""
    world = World(rule)
    monkeypatch.setattr(clock, "perf_counter", world.perf_counter)
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=world.perf_counter))
    return world
