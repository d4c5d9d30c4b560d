"""Refuses models that were wrapped for distributed training before they are patched."""

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
    """Refuse models that contain wrappers, because they cannot be copied for a dry run."""
    kinds = _wrapper_classes()
    for name, module in model.named_modules():
        for kind in kinds:
            if isinstance(module, kind):
                where = f"its part {name!r}" if name else "the model"
                raise InvalidOption(
                    f"{where} is already wrapped in {kind.__name__}, which would miss the weights "
                    "that a patch adds: patch the model first, then wrap it"
                )


def refuse_wrapped(model: nn.Module, planned: PatchState) -> None:
    """Refuse trainable planner weights for a model that is wrapped already.

    The wrapper would neither broadcast them to all processes nor average their gradients.

    Args:
        model: The model as the user passed it, including wrappers.
        planned: The patch, not installed yet.
    """
    wrapped = any(isinstance(module, DistributedDataParallel) for module in model.modules())
    if wrapped and any(weight.requires_grad for weight in _planner_weights(planned)):
        raise InvalidOption(
            f"{planned.strategy.name!r} has trainable weights, but this model is already wrapped "
            "in DistributedDataParallel, which would ignore them: every process would train its "
            "own. Patch the model first, then wrap it"
        )


class RefuseUnreduced:
    """Forward pre-hook that raises if a DDP wrapper does not know all trainable planner weights.

    `refuse_wrapped` sees only wrappers that were passed to `patch`.
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
                f"{self.owner.strategy.name!r} has trainable weights, but "
                "DistributedDataParallel was created before they existed: every process would "
                "train its own. Call unpatch(), patch the model, then wrap it"
            )


def _wrapper_classes() -> tuple[type, ...]:
    """Classes of wrappers. Those of FSDP count only if they are imported: else none can exist."""
    module = sys.modules.get("torch.distributed.fsdp")
    names = ("FullyShardedDataParallel", "FSDPModule")
    sharded = [getattr(module, name) for name in names if hasattr(module, name)]
    return (DistributedDataParallel, *sharded)


def _planner_weights(state: PatchState) -> Iterator[nn.Parameter]:
    for planner in planner_modules(state):
        yield from planner.parameters()


def planner_modules(state: PatchState) -> list[nn.Module]:
    """The planners that are modules."""
    planners: list[Any] = [runtime.planner for runtime in state.runtimes]
    planners += [block.planner for block in state.blocks]
    return [planner for planner in planners if isinstance(planner, nn.Module)]
