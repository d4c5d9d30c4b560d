"""Select the weights that a stage trains, and restore a model's settings afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from sparsiattn.errors import InvalidOption
from sparsiattn.patching.handle import Patch, patch_of
from sparsiattn.patching.model_call import modes_restored
from sparsiattn.runtime.site_runtime import PLANNER, is_planner_key
from sparsiattn.strategies.base import LearnedPlanner
from sparsiattn.strategies.keep_predictor import KeepPredictor
from sparsiattn.training.stage import Stage

SWITCH = "grad_checkpointing"  # attribute of timm's models and their parts


def has_planners(model: nn.Module) -> bool:
    """Whether a model has learned planners."""
    return any(is_planner_key(name) for name, _ in model.named_parameters())


def require_gradients(patch: Patch, stage: Stage, host: set[str]) -> None:
    """Enable gradients for the weights that a stage trains, and disable them for the others.

    Args:
        patch: The model's patch.
        stage: The stage, with its losses.
        host: Names of the model's own weights that the user has not frozen.

    Raises:
        InvalidOption: There are no weights to train, or a loss has no weights to train.
    """
    _check_losses(patch, stage)
    names = set() if stage.trainable == "planners" else set(host)
    if stage.trainable != "backbone":
        names |= _planners(patch, stage)
    if not names:
        raise InvalidOption(f"stage {stage.name!r} {_nothing_to_train(patch, stage)}")
    for name, weight in patch.model.named_parameters():
        weight.requires_grad_(name in names)


def _planners(patch: Patch, stage: Stage) -> set[str]:
    """Names of the planner weights that get a gradient from a loss of this stage.

    Planners that select keys learn only by reconstruction, as a hard selection has no gradient;
    token scores learn by all other losses, and differentiable planners by either.
    """
    fitted, hard = set(), set()
    for planner in patch.model.modules():
        if isinstance(planner, LearnedPlanner):
            weights = set(planner.parameters())
            fitted |= weights if stage.reconstruction else set()
            hard |= set() if planner.differentiable else weights
    return {
        name
        for name, weight in patch.model.named_parameters()
        if is_planner_key(name)
        and (weight in fitted or (stage.runs_student and weight not in hard))
    }


def _nothing_to_train(patch: Patch, stage: Stage) -> str:
    name = patch.strategy.name
    if stage.trainable == "backbone":
        return "trains the backbone, but all of its weights are frozen: unfreeze some"
    if not has_planners(patch.model):
        return (
            f"trains planners, but {name!r} has no learned planners: patch with 'connectivity' or "
            "'token_drop' with score='learned', or set trainable: backbone"
        )
    return (
        f"trains the planners of {name!r}, but its losses ({', '.join(stage.losses)}) give them no "
        "gradient: planners that select keys need reconstruction, learned token scores need ce, kl "
        "or keep_ratio"
    )


def _check_losses(patch: Patch, stage: Stage) -> None:
    name, learns = patch.strategy.name, patch.has_learned_planners
    if stage.reconstruction and (stage.trainable == "backbone" or not learns):
        reason = "trainable is 'backbone', which freezes planners: set trainable: planners"
        if not learns:
            reason = f"{name!r} has none: remove reconstruction"
        raise InvalidOption(
            f"stage {stage.name!r} has nothing to train by reconstruction, which fits planners "
            f"that select keys, but {reason}"
        )
    scores = any(isinstance(module, KeepPredictor) for module in patch.model.modules())
    if stage.keep_ratio and not scores:
        raise InvalidOption(
            f"stage {stage.name!r}: keep_ratio needs learned token scores, but {name!r} has none: "
            "patch with 'token_drop' and score='learned'"
        )


def set_modes(model: nn.Module, stage: Stage) -> None:
    """Set the training mode for a stage.

    The modules of a frozen backbone stay in eval mode, so that running statistics do not change.
    Planners are in training mode, as is the model itself, whose mode decides whether token scores
    train.
    """
    model.train(stage.trainable != "planners")
    model.training = True
    for module in model.modules():
        if PLANNER in module._modules:
            module._modules[PLANNER].train()  # type: ignore[union-attr]


@contextmanager
def checkpointing(model: Any, on: bool) -> Iterator[None]:
    """Enable the model's own gradient checkpointing inside the block.

    Args:
        model: A model of timm or transformers.
        on: Whether to enable it.

    Raises:
        InvalidOption: The model does not support gradient checkpointing.
    """
    # the attribute that both properties of transformers read
    used = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    with ExitStack() as stack:
        if hasattr(model, "set_grad_checkpointing") and on and not used:
            for module in model.modules():
                if SWITCH in vars(module):
                    stack.callback(setattr, module, SWITCH, vars(module)[SWITCH])
            model.set_grad_checkpointing(True)
        elif on and not used:
            stack.callback(_switch_transformers_on(model))
        yield


def _switch_transformers_on(model: Any) -> Callable[[], None]:
    """Enable checkpointing, and return the function that disables it (renamed in version 5)."""
    for kind in ("activation", "gradient"):
        enable = getattr(model, f"{kind}_checkpointing_enable", None)
        if enable is not None and getattr(model, "supports_gradient_checkpointing", True):
            # reentrant checkpointing would lose the gradient of reduced tokens
            enable(**{f"{kind}_checkpointing_kwargs": {"use_reentrant": False}})
            switch_off: Callable[[], None] = getattr(model, f"{kind}_checkpointing_disable")
            return switch_off
    raise InvalidOption(
        f"{type(model).__name__} has no gradient checkpointing (neither timm's "
        "set_grad_checkpointing nor transformers'): remove grad_checkpointing"
    )


@contextmanager
def settings_restored(model: nn.Module) -> Iterator[None]:
    """Restore modes, requires_grad and device after the block, but keep the weights.

    Gradients are removed, and new planners that select keys are frozen.
    """
    modules = {id(module) for module in model.modules()}
    gradients = [(weight, weight.requires_grad) for weight in model.parameters()]
    device = next((weight.device for weight in model.parameters()), torch.device("cpu"))
    try:
        with modes_restored(model):
            yield
    finally:
        model.to(device)
        patch = patch_of(model)
        blocks = [] if patch is None else patch.blocks
        scorers = [block.planner for block in blocks if isinstance(block.planner, nn.Module)]
        scores = {weight for planner in scorers for weight in planner.parameters()}
        for name, weight in model.named_parameters():
            weight.grad = None
            if is_planner_key(name):
                # new token scores require gradients, planners that select keys do not
                weight.requires_grad_(weight in scores)
        for weight, required in gradients:
            weight.requires_grad_(required)
        for module in model.modules():
            planner = module._modules.get(PLANNER)
            if planner is not None and id(planner) not in modules:  # new: no mode to restore
                planner.train(module.training)
