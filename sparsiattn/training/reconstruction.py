"""How well planners reproduce the model's own dense attention."""

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


def output_errors(patch: Patch, images: Any) -> dict[str, tuple[float, float]]:
    """What sites lose by their planners' plans, and what by their `unfitted_plan`.

    Both with the site's budget, tile and background, as errors of the output relative to dense
    attention. Sites where only one of the plans can be had are left out.
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
        except KernelRefused:  # a kernel that was named and takes no such lists
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
    """Run the host without gradients; every learned planner meets its operands on the way."""

    def observe(site: Site, planner: Planner, inputs: AttentionInputs) -> None:
        if isinstance(planner, LearnedPlanner):
            visit(planner, inputs)

    with eval_mode(patch.model), patch.observing(observe), torch.no_grad():
        patch.model(images)
