"""What one stage holds while it runs: objective, optimizer, schedule, averaged weights."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from sparsiattn.errors import InvalidOption
from sparsiattn.handle import Patch, patch_of
from sparsiattn.training import warmdown
from sparsiattn.training.losses import Objective
from sparsiattn.training.recipe import Stage


class Running:
    """A stage under way. total: its updates."""

    def __init__(
        self, model: nn.Module, stage: Stage, teacher: nn.Module | None,
        weights: list[nn.Parameter], accelerator: Any, per_epoch: int | None,
    ) -> None:  # fmt: skip
        self.stage, self.weights, self.accelerator = stage, weights, accelerator
        self.total, warmup = lengths(stage, per_epoch)
        model.to(accelerator.device)
        optimizer = make_optimizer(model, stage)
        self.schedule = make_schedule(optimizer, stage, self.total, warmup)
        self.ema = make_average(model, stage)
        objective = Objective(model, stage, teacher)
        self.objective, self.optimizer = accelerator.prepare(objective, optimizer)

    @property
    def averaged(self) -> nn.Module | None:
        """The model with averaged weights."""
        return None if self.ema is None else self.ema.module

    def begin(self, update: int) -> float:
        """Set the learning rate of an update; returns it."""
        self.schedule.step_update(update)
        return float(self.optimizer.param_groups[0]["lr"])

    def losses(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        device = self.accelerator.device
        if self.stage.losses.get("ce") and not labels.is_floating_point():
            self._check_labels(labels)
        found: dict[str, Tensor] = self.objective(images.to(device), labels.to(device))
        return found

    def _check_labels(self, labels: Tensor) -> None:
        """While they are still on the CPU: on a GPU a wrong one ends the process."""
        from sparsiattn.training.preprocess import head_size
        from sparsiattn.training.samples import check_label

        classes = head_size(self.accelerator.unwrap_model(self.objective).model)
        if labels.numel():
            check_label(int(labels.min()), int(labels.max()), classes, "a batch")

    def clip(self) -> dict[str, float]:
        """Clip the gradient where asked; gives its norm, of which one bad number makes NaN."""
        most = math.inf if self.stage.clip is None else self.stage.clip
        norm = float(self.accelerator.clip_grad_norm_(self.weights, most))
        scales = self.accelerator.scaler is not None  # it skips such steps and lowers its scale
        return {} if scales else {"the norm of the gradient": norm}

    def end(self, model: nn.Module) -> None:
        if self.ema is not None:
            self.ema.update(model)

    def settle(self, model: nn.Module) -> None:
        """The stage ends with its averaged weights."""
        if self.ema is not None:
            model.load_state_dict(self.ema.module.state_dict())

    def follow(self, live: Patch) -> None:
        """Give the averaged model the patch that the model has got."""
        own = None if self.ema is None else patch_of(self.ema.module)
        if own is not None:
            warmdown.apply(own, live.strategy)

    def state(self) -> dict[str, Any]:
        scaler = self.accelerator.scaler
        return {
            "optimizer": self.optimizer.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        if state["scaler"] is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])


def lengths(stage: Stage, per_epoch: int | None) -> tuple[int, int]:
    """Updates of a stage, and of its warm-up."""
    if per_epoch is None and (stage.steps is None or stage.warmup_epochs):
        raise InvalidOption(
            f"stage {stage.name!r} counts in epochs, and this data does not say how long one is: "
            "give steps (and warmup_steps) instead"
        )
    once = per_epoch or 0
    total = stage.steps if stage.steps is not None else (stage.epochs or 0) * once
    warmup = stage.warmup_steps or round((stage.warmup_epochs or 0) * once)
    if warmup >= total:
        raise InvalidOption(
            f"stage {stage.name!r} lasts {total} updates, and its warm-up {warmup}: shorten "
            "warmup_epochs (or warmup_steps)"
        )
    return total, warmup


def make_optimizer(model: nn.Module, stage: Stage) -> torch.optim.Optimizer:
    """timm's, without weight decay for biases and norms."""
    from timm.optim import create_optimizer_v2

    try:
        made = create_optimizer_v2(
            model, opt=stage.optimizer, lr=stage.lr, weight_decay=stage.weight_decay
        )
    except (AssertionError, ValueError, RuntimeError, TypeError) as error:
        raise InvalidOption(
            f"timm cannot make the optimizer {stage.optimizer!r} of stage {stage.name!r}: {error}"
        ) from error
    return made  # type: ignore[no-any-return]


def make_schedule(optimizer: Any, stage: Stage, total: int, warmup: int) -> Any:
    """timm's cosine, in updates; it has no state but the number of the update."""
    from timm.scheduler import CosineLRScheduler

    return CosineLRScheduler(
        optimizer, t_initial=total, lr_min=stage.min_lr, warmup_t=warmup,
        warmup_lr_init=stage.warmup_lr, t_in_epochs=False,
    )  # fmt: skip


def make_average(model: nn.Module, stage: Stage) -> Any:
    if stage.ema_decay is None:
        return None
    from timm.utils import ModelEmaV3

    return ModelEmaV3(model, decay=stage.ema_decay)
