"""Fit learned planners to a model's own attention; no labels, the host's weights untouched."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from sparsiattn.errors import InvalidOption
from sparsiattn.handle import Patch, patch_of
from sparsiattn.runtime import SiteRuntime
from sparsiattn.strategy import LearnedPlanner
from sparsiattn.training.reconstruction import site_losses


def calibrate(
    model: nn.Module,
    images: Iterable[Tensor],
    *,
    steps: int | None = None,
    lr: float = 1e-3,
    on_step: Callable[[int, float], Any] | None = None,
) -> list[float]:
    """Train the planners of a patched model to reproduce its dense attention.

    images: batches ``[B, 3, H, W]`` (or ``(batch, ...)`` tuples, whose rest is ignored), gone
    through once, or until ``steps``. lr: of Adam, decayed to zero over ``steps`` where given.
    on_step: called with the step and its loss. Returns the loss of every step (mean over sites).
    """
    live = patch_of(model)
    runtimes = [] if live is None else [r for r in live.runtimes if _learns(r)]
    if live is None or not runtimes:
        raise InvalidOption(
            "calibrate() fits learned planners, and this model has none: patch it with one first, "
            "e.g. patch(model, strategy='connectivity')"
        )
    weights = [p for runtime in runtimes for p in runtime.planner.parameters()]  # type: ignore[attr-defined]
    frozen = [p.requires_grad for p in weights]
    for weight in weights:
        weight.requires_grad_(True)
    try:
        return _fit(live, weights, images, steps, lr, on_step)
    finally:
        for weight, before in zip(weights, frozen, strict=True):
            weight.requires_grad_(before)
            weight.grad = None


def _learns(runtime: SiteRuntime) -> bool:
    return isinstance(runtime.planner, LearnedPlanner)


def _fit(
    live: Patch,
    weights: list[nn.Parameter],
    images: Iterable[Any],
    steps: int | None,
    lr: float,
    on_step: Callable[[int, float], Any] | None,
) -> list[float]:
    optimizer = torch.optim.Adam(weights, lr)
    losses: list[float] = []
    for step, batch in enumerate(images):
        if step == steps:
            break
        if steps:
            optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        parts = site_losses(live, batch[0] if isinstance(batch, (tuple, list)) else batch)
        loss = torch.stack(parts).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if on_step is not None:
            on_step(step, losses[-1])
    if not losses:
        raise InvalidOption("calibrate() got no images: pass at least one batch [B, C, H, W]")
    return losses
