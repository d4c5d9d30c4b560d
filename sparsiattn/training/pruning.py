"""Weights that stay zero while a stage trains: global magnitude pruning."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from sparsiattn.errors import InvalidOption
from sparsiattn.runtime.site_runtime import is_planner_key
from sparsiattn.training.recipe import Stage

_PRODUCTS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Pruned:
    """The smallest weights of a model, set to zero and held there.

    `torch.nn.utils.prune.global_unstructured` chooses them, by `prune.L1Unstructured`, on modules
    that only borrow the weights: no parameter of the model gets another name, so checkpoints,
    averages and processes see it as it always was, and there is nothing to remove before it is
    saved. Gradients are masked as they come and weights after every step, which is what that
    module's own masks come to. Zeros that no kernel skips save no time.
    """

    def __init__(self, model: nn.Module, stage: Stage) -> None:
        self.masks: dict[str, Tensor] = {}
        self.weights = dict(candidates(model, norms=stage.prune_norms)) if stage.prune else {}
        if self.weights:
            self._choose(stage.prune)
            self.hold()
        trained = [(name, weight) for name, weight in self.weights.items() if weight.requires_grad]
        self._hooks = [weight.register_hook(self._masked(name)) for name, weight in trained]

    def _choose(self, share: float) -> None:
        holders = [_Holder(weight) for weight in self.weights.values()]
        prune.global_unstructured(
            [(holder, "weight") for holder in holders],
            pruning_method=prune.L1Unstructured,
            amount=share,
        )
        masks = (holder.get_buffer("weight_mask").bool() for holder in holders)
        self.masks = dict(zip(self.weights, masks, strict=True))

    def _masked(self, name: str) -> Callable[[Tensor], Tensor]:
        return lambda gradient: gradient * self.masks[name]

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

    def state(self) -> dict[str, Tensor]:
        """For a checkpoint: zeros alone could not tell a pruned weight from one that was zero."""
        return dict(self.masks)

    def load_state(self, masks: dict[str, Tensor]) -> None:
        """Of a checkpoint."""
        for name, mask in masks.items():
            self.masks[name] = mask.to(self.masks[name].device)


class _Holder(nn.Module):
    """Somewhere to prune a weight without its module noticing."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach())


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
