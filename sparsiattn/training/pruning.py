"""Weights that stay zero while a stage trains: global magnitude pruning."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, prune

from sparsiattn.errors import InvalidOption
from sparsiattn.runtime.site_runtime import is_planner_key
from sparsiattn.training.stage import Stage

_PRODUCTS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Pruned:
    """The smallest weights of a model, set to zero and held there.

    `prune.L1Unstructured` chooses them among all weights at once, as `prune.global_unstructured`
    does; but that would give parameters of the model other names. So checkpoints, averages and
    processes see the model as it always was, and there is nothing to remove before it is saved.
    Gradients are masked as they come and weights after every step, which is what that module's own
    masks come to. Zeros that no kernel skips save no time.
    """

    def __init__(self, model: nn.Module, stage: Stage) -> None:
        self.masks: dict[str, Tensor] = {}
        self.weights = dict(candidates(model, norms=stage.prune_norms)) if stage.prune else {}
        if self.weights:
            vector = parameters_to_vector(self.weights.values()).detach()
            method = prune.L1Unstructured(stage.prune)
            mask = method.compute_mask(vector, default_mask=torch.ones_like(vector)).bool()
            masks = mask.split([weight.numel() for weight in self.weights.values()])
            for (name, weight), part in zip(self.weights.items(), masks, strict=True):
                self.masks[name] = part.view_as(weight).clone()
            self.hold()
        self._hooks = [
            weight.register_hook(partial(self._masked, name))
            for name, weight in self.weights.items()
            if weight.requires_grad
        ]

    def _masked(self, name: str, gradient: Tensor) -> Tensor:
        return gradient * self.masks[name]

    @torch.no_grad()
    def hold(self) -> None:
        """Zero again what an update moved (weight decay, momentum of an earlier stage)."""
        for name, weight in self.weights.items():
            weight.mul_(self.masks[name])

    def end(self) -> None:
        """Let go of the model."""
        for hook in self._hooks:
            hook.remove()
        self.weights, self.masks, self._hooks = {}, {}, []

    def load_state(self, masks: dict[str, Tensor]) -> None:
        """Take over those of a checkpoint: zeros alone do not show which weights were pruned."""
        for name, mask in masks.items():
            self.masks[name] = mask.to(self.masks[name].device)


def candidates(model: nn.Module, *, norms: bool) -> list[tuple[str, nn.Parameter]]:
    """What is pruned: the matrices of linear and convolution layers (patch embedding, attention,
    MLP, classifier), and with ``norms`` the gains of normalisation layers; neither biases nor what
    planners learn. A weight that several modules share counts once."""
    weights: dict[int, tuple[str, nn.Parameter]] = {}
    for path, module in model.named_modules():
        weight = getattr(module, "weight", None)
        name = f"{path}.weight".lstrip(".")
        if not isinstance(weight, nn.Parameter) or is_planner_key(name):
            continue
        if isinstance(module, _PRODUCTS) or (norms and weight.dim() == 1):
            weights.setdefault(id(weight), (name, weight))
    if not weights:
        raise InvalidOption(f"{type(model).__name__} has no linear or convolution layer to prune")
    return list(weights.values())
