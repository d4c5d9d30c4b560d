"""How well planners reproduce the model's own dense attention."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sparsiattn.attention.inputs import AttentionInputs
from sparsiattn.attention.site import Site
from sparsiattn.patching.handle import Patch
from sparsiattn.patching.model_call import eval_mode
from sparsiattn.strategies.base import LearnedPlanner, Planner


def site_losses(patch: Patch, images: Tensor) -> list[Tensor]:
    """One loss per learned site for one batch; the host itself runs without gradients."""
    losses: list[Tensor] = []

    @torch.enable_grad()
    def add_loss(planner: LearnedPlanner, inputs: AttentionInputs) -> None:
        losses.append(planner.loss(inputs))

    _visit(patch, images, add_loss)
    return losses


def start_planners(patch: Patch, images: Tensor) -> None:
    """Every learned planner's closed-form start from one batch, where that lowers its loss."""

    def start(planner: LearnedPlanner, inputs: AttentionInputs) -> None:
        before = {name: value.clone() for name, value in planner.state_dict().items()}
        loss = planner.loss(inputs)
        if not loss.isfinite():
            return
        planner.init_from_batch(inputs)
        if not planner.loss(inputs) < loss:
            planner.load_state_dict(before)

    _visit(patch, images, start)


def _visit(
    patch: Patch, images: Tensor, visit: Callable[[LearnedPlanner, AttentionInputs], None]
) -> None:
    """Run the host without gradients; every learned planner meets its operands on the way."""

    def observe(site: Site, planner: Planner, inputs: AttentionInputs) -> None:
        if isinstance(planner, LearnedPlanner):
            visit(planner, inputs)

    with eval_mode(patch.model), patch.observing(observe), torch.no_grad():
        patch.model(images)
