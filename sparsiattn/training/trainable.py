"""Which weights a stage trains, and the model as it was afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from sparsiattn.errors import InvalidOption
from sparsiattn.patching.model_call import modes_restored
from sparsiattn.runtime.handle import Patch, patch_of
from sparsiattn.runtime.site_runtime import PLANNER
from sparsiattn.strategies.base import LearnedPlanner
from sparsiattn.strategies.keep_predictor import KeepPredictor
from sparsiattn.training.recipe import Stage

SWITCH = "grad_checkpointing"  # of timm's models and their parts


def is_planner(name: str) -> bool:
    """Whether a weight of that name belongs to a planner."""
    return f".{PLANNER}." in f".{name}"


def has_planners(model: nn.Module) -> bool:
    return any(is_planner(name) for name, _ in model.named_parameters())


def choose(live: Patch, stage: Stage, host: set[str]) -> list[nn.Parameter]:
    """Switch gradients on for what a stage trains and off for the rest.

    host: names of the model's own weights that the user has not frozen. Raises `InvalidOption` if
    nothing is left to train, or a loss has nothing that it could change.
    """
    _check_losses(live, stage)
    names = set(host) if stage.trainable != "planners" else set()
    if stage.trainable != "backbone":
        names |= _planners(live, stage)
    if not names:
        raise InvalidOption(_nothing(live, stage))
    chosen = []
    for name, weight in live.model.named_parameters():
        weight.requires_grad_(name in names)
        if name in names:
            chosen.append(weight)
    return chosen


def _planners(live: Patch, stage: Stage) -> set[str]:
    """Planner weights that a loss of this stage reaches: those that choose keys learn by
    reconstruction alone (a hard choice has no gradient), token scores by all other losses, and
    differentiable planners by either."""
    learned = [module for module in live.model.modules() if isinstance(module, LearnedPlanner)]
    every = {id(weight) for module in learned for weight in module.parameters()}
    hard = {id(w) for module in learned if not module.differentiable for w in module.parameters()}
    reached: set[int] = every if "reconstruction" in stage.losses else set()
    return {
        name
        for name, weight in live.model.named_parameters()
        if is_planner(name)
        and (id(weight) in reached or (stage.runs_student and id(weight) not in hard))
    }


def _nothing(live: Patch, stage: Stage) -> str:
    name = live.strategy.name
    if stage.trainable == "backbone":
        return f"stage {stage.name!r} trains the backbone, and all of its weights are frozen"
    if not has_planners(live.model):
        return (
            f"stage {stage.name!r} trains planners, and {name!r} has none that learn: patch with "
            "'connectivity' or 'token_drop' with score='learned', or set trainable: backbone"
        )
    return (
        f"stage {stage.name!r} trains the planners of {name!r}, and its losses "
        f"({', '.join(stage.losses)}) pass them no gradient: those that choose keys need "
        "reconstruction, learned token scores need ce, kl or keep_ratio"
    )


def _check_losses(live: Patch, stage: Stage) -> None:
    if "reconstruction" in stage.losses and (stage.trainable == "backbone" or not live.learns):
        why = (
            f"{live.strategy.name!r} has none"
            if not live.learns
            else "trainable is 'backbone', which leaves them alone"
        )
        raise InvalidOption(
            f"stage {stage.name!r} has nothing to train by reconstruction: it fits planners that "
            f"choose keys, and {why}"
        )
    scores = any(isinstance(module, KeepPredictor) for module in live.model.modules())
    if "keep_ratio" in stage.losses and not scores:
        raise InvalidOption(
            f"stage {stage.name!r}: keep_ratio is for learned token scores, and "
            f"{live.strategy.name!r} has none: patch with 'token_drop' and score='learned'"
        )


def set_modes(model: nn.Module, stage: Stage) -> None:
    """Training mode; a frozen backbone stays in eval mode, planners and the model itself apart
    (the latter says whether token scores train), so that no running statistic moves."""
    model.train()
    if stage.trainable != "planners":
        return
    model.eval()
    model.training = True
    for module in model.modules():
        if PLANNER in module._modules:
            module._modules[PLANNER].train()  # type: ignore[union-attr]


@contextmanager
def checkpointing(model: Any, on: bool) -> Iterator[None]:
    """Gradient checkpointing by the model's own switch inside the block.

    Raises `InvalidOption` for a model that has none.
    """
    if not on or _checkpoints_already(model):
        yield
    elif hasattr(model, "set_grad_checkpointing"):
        before = [(m, vars(m)[SWITCH]) for m in model.modules() if SWITCH in vars(m)]
        try:
            model.set_grad_checkpointing(True)
            yield
        finally:
            for module, value in before:
                setattr(module, SWITCH, value)
    else:
        kind = _transformers_switch(model)
        try:
            yield
        finally:
            getattr(model, f"{kind}_checkpointing_disable")()


def _checkpoints_already(model: Any) -> bool:
    """Whether the user switched a transformers model's on; its name changed in version 5."""
    kinds = ("is_activation_checkpointing", "is_gradient_checkpointing")
    name = next((kind for kind in kinds if hasattr(type(model), kind)), None)
    return name is not None and bool(getattr(model, name))


def _transformers_switch(model: Any) -> str:
    """Switch it on; gives what this version of transformers calls it."""
    for kind in ("activation", "gradient"):
        enable = getattr(model, f"{kind}_checkpointing_enable", None)
        if enable is not None and getattr(model, "supports_gradient_checkpointing", True):
            # the reentrant kind would lose the gradient of reduced tokens
            enable(**{f"{kind}_checkpointing_kwargs": {"use_reentrant": False}})
            return kind
    raise InvalidOption(
        f"{type(model).__name__} has no gradient checkpointing (neither timm's "
        "set_grad_checkpointing nor transformers'): leave grad_checkpointing out"
    )


@contextmanager
def left_as_found(model: nn.Module) -> Iterator[None]:
    """Modes, requires_grad and device as before; gradients of training are gone. Weights stay as
    they are inside. Planners that are new stay frozen."""
    modules = {id(module) for module in model.modules()}
    grads = [(weight, weight.requires_grad) for weight in model.parameters()]
    device = next((weight.device for weight in model.parameters()), torch.device("cpu"))
    try:
        with modes_restored(model):
            yield
    finally:
        model.to(device)
        live = patch_of(model)
        for name, weight in model.named_parameters():
            weight.grad = None
            if is_planner(name):
                weight.requires_grad_(_is_score(live, weight))
        for weight, wanted in grads:
            weight.requires_grad_(wanted)
        _new_planners_follow(model, modules)


def _is_score(live: Patch | None, weight: nn.Parameter) -> bool:
    """Token scores come with gradients switched on, planners that choose keys without."""
    blocks = [] if live is None else live.blocks
    return any(
        weight is own
        for block in blocks
        if isinstance(block.planner, nn.Module)
        for own in block.planner.parameters()
    )


def _new_planners_follow(model: nn.Module, old: set[int]) -> None:
    """Planners that were not there before are in the mode of the module that holds them."""
    for module in model.modules():
        planner = module._modules.get(PLANNER)
        if planner is not None and id(planner) not in old:
            planner.train(module.training)
