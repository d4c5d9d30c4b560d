"""How well planners reproduce the model's own dense attention."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from sparsiattn.handle import Patch
from sparsiattn.site import AttentionInputs, Site
from sparsiattn.strategy import LearnedPlanner, Planner


def site_losses(live: Patch, images: Tensor) -> list[Tensor]:
    """One loss per learned site for one batch; the host itself runs without gradients."""
    losses: list[Tensor] = []

    def observe(site: Site, planner: Planner, inputs: AttentionInputs) -> None:
        if isinstance(planner, LearnedPlanner):
            with torch.enable_grad():
                losses.append(planner.loss(inputs))

    with resting(live.model), live.observing(observe), torch.no_grad():
        live.model(images)
    return losses


@contextmanager
def resting(model: nn.Module) -> Iterator[nn.Module]:
    """Eval mode inside the block; every module's own mode again afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield model
    finally:
        for module, training in modes:
            module.training = training
