"""How well planners reproduce the model's own dense attention."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from sparsiattn.attention.inputs import AttentionInputs
from sparsiattn.attention.site import Site
from sparsiattn.patching.handle import Patch
from sparsiattn.strategies.base import LearnedPlanner, Planner


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


def start_planners(live: Patch, images: Tensor) -> None:
    """Every learned planner's closed-form start from one batch, where that lowers its loss."""

    def observe(site: Site, planner: Planner, inputs: AttentionInputs) -> None:
        if not isinstance(planner, LearnedPlanner):
            return
        before = {name: value.clone() for name, value in planner.state_dict().items()}
        loss = planner.loss(inputs)
        if not loss.isfinite():
            return
        planner.init_from_batch(inputs)
        if not planner.loss(inputs) < loss:
            planner.load_state_dict(before)

    with resting(live.model), live.observing(observe), torch.no_grad():
        live.model(images)


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
