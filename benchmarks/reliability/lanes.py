"""Patched and unpatched models with an input and the answer that they gave alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import sparsiattn
from reliability.hosts import Host, build

KINDS: tuple[tuple[str, str | None, dict[str, Any]], ...] = (
    ("vit", None, {}),
    ("vit", "topk", {"k": 0.25}),
    ("vit", "connectivity", {"k": 0.25, "tile": (2, 2)}),
    ("unfused", None, {}),
    ("unfused", "local", {"k": 0.3}),
    ("swin", None, {}),
    ("swin", "random", {"k": 0.5}),
    ("vit", "token_drop", {"keep": 0.5}),
    ("vit", "token_drop", {"keep": "adaptive", "mass": 0.6}),
    ("vit", "token_merge", {"r": 3}),
    ("vit", "hybrid", {"k": 0.3, "keep": 0.5}),
    ("vit", "attention_reuse", {"layers": (1,)}),
    ("vit", "linformer", {"k": 0.25}),
    ("vit", "ats", {"keep": 0.5}),
)
"""Family of the host, strategy (None: unpatched) and its options: one of every way in."""


@dataclass
class Lane:
    """One model and its answer to one batch, logits and features."""

    name: str
    model: Any
    x: Tensor
    answer: Tensor
    features: Tensor

    def right(self) -> bool:
        """Whether the model answers now as it did alone, bit for bit."""
        return torch.equal(self.model(self.x), self.answer)

    def right_features(self) -> bool:
        return torch.equal(self.model.forward_features(self.x), self.features)


def lane(number: int) -> Lane:
    """The lane of that number; their kinds repeat, each with an input of its own."""
    family, strategy, options = KINDS[number % len(KINDS)]
    model: Any = fresh(Host(family=family))
    if strategy is not None:
        sparsiattn.patch(model, strategy, only_if_faster=False, **options)
    generator = torch.Generator().manual_seed(number)
    x = torch.randn(1 + number % 3, 3, 16, 16, generator=generator)
    with torch.no_grad():
        name = f"{strategy or 'unpatched'} on {family}"
        return Lane(name, model, x, model(x), model.forward_features(x))


def fresh(host: Host) -> nn.Module:
    """A model of its own, equal to `build`'s."""
    return build.__wrapped__(host)
