"""Wrappers that hold weights equal in all processes, and weights that come after them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sparsiattn.errors import InvalidOption
from sparsiattn.runtime.patch_state import PatchState


def refuse_inside(model: nn.Module) -> None:
    """Refuse wrappers in the model itself, of which no copy for a dry run can be made."""
    for name, module in model.named_modules():
        for kind in _wrapper_classes():
            if isinstance(module, kind):
                where = f"its part {name!r}" if name else "the model"
                raise InvalidOption(
                    f"{where} is wrapped in {kind.__name__} already, and what a patch adds must be "
                    "there before: patch the model first, then wrap it"
                )


def refuse_wrapped(model: nn.Module, planned: PatchState) -> None:
    """Refuse weights that train where a wrapper was made without them.

    It would neither spread them over the processes nor average their gradients.

    Args:
        model: What the user gave, wrappers included.
        planned: The patch, not in the model yet.
    """
    wrapped = any(isinstance(module, DistributedDataParallel) for module in model.modules())
    if wrapped and any(weight.requires_grad for weight in _planner_weights(planned)):
        raise InvalidOption(
            f"{planned.strategy.name!r} has weights that train, and this model is wrapped in "
            "DistributedDataParallel already, which would leave them out: every process would "
            "train its own. Patch the model first, then wrap it"
        )


class RefuseUnreduced:
    """Forward pre-hook of the model: a wrapper around it must know all weights that train.

    `refuse_wrapped` sees only wrappers that `patch` was given.
    """

    def __init__(self, owner: PatchState) -> None:
        self.owner = owner

    def __call__(self, module: nn.Module, args: object) -> None:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return
        wrapper = DistributedDataParallel._get_active_ddp_module()
        if wrapper is None:
            return
        known = {id(weight) for weight in wrapper.module.parameters()}
        reduced = {id(weight) for weight in wrapper._module_parameters} & known
        weights = _planner_weights(self.owner)
        if any(w.requires_grad and id(w) in known - reduced for w in weights):
            raise InvalidOption(
                f"{self.owner.strategy.name!r} has weights that train, and "
                "DistributedDataParallel was made around this model before they were there: every "
                "process would train its own. unpatch(), patch the model, then wrap it"
            )


def _wrapper_classes() -> tuple[type, ...]:
    """Classes of wrappers; those of FSDP only if somebody imported them, or none can be there."""
    module = sys.modules.get("torch.distributed.fsdp")
    names = ("FullyShardedDataParallel", "FSDPModule")
    sharded = [getattr(module, name) for name in names if hasattr(module, name)]
    return (DistributedDataParallel, *sharded)


def _planner_weights(state: PatchState) -> Iterator[nn.Parameter]:
    for planner in planner_modules(state):
        yield from planner.parameters()


def planner_modules(state: PatchState) -> list[nn.Module]:
    """Planners with weights."""
    planners: list[Any] = [runtime.planner for runtime in state.runtimes]
    planners += [block.planner for block in state.blocks]
    return [planner for planner in planners if isinstance(planner, nn.Module)]
