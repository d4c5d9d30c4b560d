"""`StageRun`: objective, optimizer, schedule and averaged weights of a running stage."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sparsiattn.errors import InvalidOption
from sparsiattn.runtime.site_runtime import is_planner_key
from sparsiattn.training import sharding
from sparsiattn.training.losses import Objective
from sparsiattn.training.preprocess import head_size
from sparsiattn.training.pruning import Pruned
from sparsiattn.training.samples import check_labels
from sparsiattn.training.stage import Stage


@dataclass(eq=False)
class StageRun:
    """A running stage.

    Attributes:
        user_model: The user's patched model.
        stage: The settings of the stage.
        teacher: A dense model; None for the model itself.
        accelerator: The run's ``Accelerator``.
        per_epoch: Number of updates in an epoch; None if unknown.
        total: Number of updates in the stage.
        model: The model that is trained: the user's model, or a copy of it in sharded training.
    """

    user_model: nn.Module
    stage: Stage
    teacher: nn.Module | None
    accelerator: Any
    per_epoch: int | None

    def __post_init__(self) -> None:
        model, stage, accelerator = self.user_model, self.stage, self.accelerator
        self.total, warmup = lengths(stage, self.per_epoch)
        self.sharded = sharding.is_sharded(accelerator)
        self.model = sharding.copy_of(model) if self.sharded else model.to(accelerator.device)
        self.pruned = Pruned(self.model, stage)
        optimizer = make_optimizer(self.model, stage)
        self.scalars = sharding.scalars(model, self.model, optimizer) if self.sharded else set()
        self.schedule = make_schedule(optimizer, stage, self.total, warmup)
        self.ema: Any = None
        if stage.ema_decay is not None:
            from timm.utils import ModelEmaV3

            self.ema = ModelEmaV3(self.model, decay=stage.ema_decay)
        prepare = accelerator.prepare
        if self.sharded:
            reshard = stage.trainable == "backbone"
            prepare = partial(sharding.prepare, accelerator, reshard=reshard)
        objective = Objective(self.model, stage, self.teacher)
        self.objective, self.optimizer = prepare(objective, optimizer)
        self.weights = [weight for weight in self.objective.parameters() if weight.requires_grad]

    @property
    def averaged(self) -> nn.Module | None:
        """The model with averaged weights; None without an average."""
        return None if self.ema is None else self.ema.module

    def begin(self, update: int) -> float:
        """Set the learning rate of an update, and return it."""
        self.schedule.step_update(update)
        return float(self.optimizer.param_groups[0]["lr"])

    def losses(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Unweighted losses of one batch by name."""
        device = self.accelerator.device
        if self.stage.ce and not labels.is_floating_point():
            check_labels(labels, head_size(self.accelerator.unwrap_model(self.objective).model))
        # accelerate adds autocast only to models that it does not shard
        with self.accelerator.autocast() if self.sharded else nullcontext():
            losses: dict[str, Tensor] = self.objective(images.to(device), labels.to(device))
        return losses

    def clip(self) -> dict[str, float]:
        """Clip the gradient if the stage sets a limit.

        Returns:
            The norm of the gradient, which is NaN if any element is; empty with a gradient scaler.
        """
        largest = math.inf if self.stage.clip is None else self.stage.clip
        norm = float(sharding.full_tensor(self.accelerator.clip_grad_norm_(self.weights, largest)))
        scales = self.accelerator.scaler is not None  # a scaler skips bad steps itself
        return {} if scales else {"the norm of the gradient": norm}

    def end(self) -> None:
        """End an update: apply the pruning masks and update the average."""
        self.pruned.hold()
        if self.ema is not None:
            self.ema.update(self.model)

    def gather(self) -> None:
        """Copy the current weights to the user's model; every process must call this."""
        if self.sharded:
            sharding.gather(self.objective, self.user_model)

    def finish(self) -> None:
        """End the stage: the user's model gets the averaged weights."""
        self.gather()
        self.pruned.end()
        if self.ema is not None:
            self.user_model.load_state_dict(self.ema.module.state_dict())

    def continue_from(self, before: StageRun) -> StageRun:
        """Take over the state of the same stage, which ran with another patch of the model."""
        self.optimizer.load_state_dict(before.optimizer.state_dict())
        self.pruned.load_state(before.pruned.masks)
        before.pruned.end()
        if self.ema is not None:
            self.ema.module.load_state_dict(before.ema.module.state_dict())
        return self

    def state(self) -> dict[str, Any]:
        """The state for a checkpoint, full in the first process; every process must call this."""
        scaler, optimizer = self.accelerator.scaler, self.optimizer.state_dict()
        if self.sharded:
            main = self.accelerator.is_main_process
            optimizer = sharding.gathered(optimizer, self.scalars, keep=main)
        return {
            "optimizer": optimizer,
            "scaler": None if scaler is None else scaler.state_dict(),
            "pruned": self.pruned.masks,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Load the state of a checkpoint."""
        optimizer = state["optimizer"]
        if self.sharded:
            optimizer = sharding.scattered(optimizer, self.scalars, self.optimizer)
        self.optimizer.load_state_dict(optimizer)
        self.pruned.load_state(state.get("pruned", {}))
        if state["scaler"] is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])


def lengths(stage: Stage, per_epoch: int | None) -> tuple[int, int]:
    """Number of updates in a stage and in its warm-up."""
    if per_epoch is None and (stage.steps is None or stage.warmup_epochs):
        raise InvalidOption(
            f"stage {stage.name!r} sets its length in epochs, but the length of this data is not "
            "known: set steps (and warmup_steps) instead"
        )
    per_epoch = per_epoch or 0
    total = stage.steps if stage.steps is not None else (stage.epochs or 0) * per_epoch
    warmup = stage.warmup_steps or round((stage.warmup_epochs or 0) * per_epoch)
    if warmup >= total:
        raise InvalidOption(
            f"the warm-up of stage {stage.name!r} must be shorter than the stage ({total} "
            f"updates), got {warmup} updates: reduce warmup_epochs (or warmup_steps)"
        )
    return total, warmup


def make_optimizer(model: nn.Module, stage: Stage) -> torch.optim.Optimizer:
    """timm's optimizer, without weight decay for biases and norms."""
    from timm.optim import create_optimizer_v2

    groups = partial(_two_rates, stage=stage) if stage.backbone_lr_scale != 1.0 else None
    try:
        return create_optimizer_v2(  # type: ignore[no-any-return]
            model, stage.optimizer, stage.lr, stage.weight_decay, param_group_fn=groups
        )
    except (AssertionError, ValueError, RuntimeError, TypeError) as error:
        raise InvalidOption(
            f"timm cannot create the optimizer {stage.optimizer!r} of stage {stage.name!r}: {error}"
        ) from error


def _two_rates(model: nn.Module, stage: Stage) -> list[dict[str, Any]]:
    """timm's parameter groups, each split into planners and backbone with their ``lr_scale``.

    Planners come first, as the log shows the learning rate of the first group.
    """
    from timm.optim import param_groups_weight_decay

    no_decay: set[str] = getattr(model, "no_weight_decay", set)()
    groups = param_groups_weight_decay(model, stage.weight_decay, no_weight_decay_list=no_decay)
    planners = {id(weight) for name, weight in model.named_parameters() if is_planner_key(name)}
    split = [
        {
            **group,
            "params": [weight for weight in group["params"] if (id(weight) in planners) == learned],
            "lr_scale": 1.0 if learned else stage.backbone_lr_scale,
        }
        for learned in (True, False)
        for group in groups
    ]
    return [group for group in split if group["params"]]


def make_schedule(optimizer: Any, stage: Stage, total: int, warmup: int) -> Any:
    """timm's cosine schedule, in updates; its only state is the number of the update."""
    from timm.scheduler import CosineLRScheduler

    return CosineLRScheduler(
        optimizer,
        t_initial=total,
        lr_min=stage.min_lr,
        warmup_t=warmup,
        warmup_lr_init=stage.warmup_lr,
        t_in_epochs=False,
    )
