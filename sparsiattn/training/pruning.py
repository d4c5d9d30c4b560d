"""Global magnitude pruning: weights that stay zero while a stage trains."""

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
    """The smallest weights of a model, set to zero and kept there.

    `prune.L1Unstructured` selects them among all weights at once. `prune.global_unstructured` does
    the same, but renames parameters of the model. Without that, checkpoints, averages and other
    processes see the model unchanged, and nothing has to be removed before saving. Gradients are
    masked when they are computed and weights after every step, which is equivalent. Zeros save no
    time, as no kernel skips them.
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
        """Set pruned weights to zero again after an update: weight decay and momentum move them."""
        for name, weight in self.weights.items():
            weight.mul_(self.masks[name])

    def end(self) -> None:
        """Remove the hooks and drop all references to the model."""
        for hook in self._hooks:
            hook.remove()
        self.weights, self.masks, self._hooks = {}, {}, []

    def load_state(self, masks: dict[str, Tensor]) -> None:
        """Load the masks of a checkpoint, as zeros do not show which weights were pruned."""
        for name, mask in masks.items():
            self.masks[name] = mask.to(self.masks[name].device)


def candidates(model: nn.Module, *, norms: bool) -> list[tuple[str, nn.Parameter]]:
    """Names and weights that can be pruned.

    These are the weights of linear and convolution layers (patch embedding, attention, MLP,
    classifier), but neither biases nor planners. A weight that several modules share counts once.

    Args:
        model: The model.
        norms: Whether to include the weights of normalisation layers.

    Raises:
        InvalidOption: The model has no such layer.
    """
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
