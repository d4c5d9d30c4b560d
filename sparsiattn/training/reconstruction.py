"""How well planners reproduce the model's own dense attention."""

from __future__ import annotations

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

    def observe(site: Site, planner: Planner, inputs: AttentionInputs) -> None:
        if isinstance(planner, LearnedPlanner):
            # a pass without gradients calls this
            with torch.enable_grad():
                losses.append(planner.loss(inputs))

    with eval_mode(patch.model), patch.observing(observe), torch.no_grad():
        patch.model(images)
    return losses


def start_planners(patch: Patch, images: Tensor) -> None:
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

    with eval_mode(patch.model), patch.observing(observe), torch.no_grad():
        patch.model(images)
