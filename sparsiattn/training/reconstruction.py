"""Reconstruction losses: how well planners reproduce the model's own dense attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparsiattn.attention.inputs import AttentionInputs
from sparsiattn.attention.pattern import Dense, Pattern
from sparsiattn.attention.site import Site
from sparsiattn.errors import KernelRefused
from sparsiattn.kernels.base import choose
from sparsiattn.patching.handle import Patch
from sparsiattn.patching.model_call import eval_mode
from sparsiattn.runtime.site_runtime import SiteRuntime
from sparsiattn.strategies.base import LearnedPlanner, Planner


def site_losses(patch: Patch, images: Tensor) -> list[Tensor]:
    """One loss per site with a learned planner, for one batch; the host runs without gradients."""
    losses: list[Tensor] = []

    @torch.enable_grad()
    def add_loss(planner: LearnedPlanner, inputs: AttentionInputs) -> None:
        losses.append(planner.loss(inputs))

    _visit(patch, images, add_loss)
    return losses


def start_planners(patch: Patch, images: Tensor) -> None:
    """Initialise learned planners in closed form from one batch, where that lowers their loss."""

    def start(planner: LearnedPlanner, inputs: AttentionInputs) -> None:
        before = {name: value.clone() for name, value in planner.state_dict().items()}
        loss = planner.loss(inputs)
        if not loss.isfinite():
            return
        planner.init_from_batch(inputs)
        if not planner.loss(inputs) < loss:
            planner.load_state_dict(before)

    _visit(patch, images, start)


def output_errors(patch: Patch, images: Any) -> dict[str, tuple[float, float]]:
    """Relative errors of attention's output with each planner's plan and with `unfitted_plan`.

    Both plans use the site's budget, tile and background. Sites without an unfitted plan, or whose
    kernel cannot compute one of the plans, are left out.

    Args:
        patch: The model's patch.
        images: One batch.

    Returns:
        By name of the site, the error of the fitted and of the unfitted plan, relative to dense
        attention.
    """
    runtimes = {runtime.site.name: runtime for runtime in patch.runtimes}
    sums: dict[str, Tensor] = {}

    def add(planner: LearnedPlanner, inputs: AttentionInputs) -> None:
        name, unfitted = inputs.site.name, planner.unfitted_plan(inputs)
        if unfitted is None or runtimes[name].stays_dense(inputs.n_keys):
            return
        dense = inputs.attention()
        try:
            outputs = [_attend(runtimes[name], x, inputs) for x in (planner(inputs), unfitted)]
        except KernelRefused:  # the user's kernel does not support such key lists
            return
        differences = torch.stack([*(output - dense for output in outputs), dense]).float()
        sums[name] = sums.get(name, 0.0) + differences.flatten(1).square().sum(1)

    _visit(patch, images, add)
    shares = {name: (squares[:2] / squares[2]).sqrt().tolist() for name, squares in sums.items()}
    return {name: (fitted, unfitted) for name, (fitted, unfitted) in shares.items()}


def _attend(runtime: SiteRuntime, plan: Pattern, inputs: AttentionInputs) -> Tensor:
    pattern = runtime.finish(plan, inputs)
    if isinstance(pattern, Dense):
        return inputs.attention()
    choice = choose(runtime.kernels, inputs, pattern, explicit=runtime.explicit)
    return choice.kernel(inputs, pattern)


def _visit(
    patch: Patch, images: Any, visit: Callable[[LearnedPlanner, AttentionInputs], None]
) -> None:
    """Run the host without gradients, and call ``visit`` with each learned planner's operands."""

    def observe(site: Site, planner: Planner, inputs: AttentionInputs) -> None:
        if isinstance(planner, LearnedPlanner):
            visit(planner, inputs)

    with eval_mode(patch.model), patch.observing(observe), torch.no_grad():
        patch.model(images)
