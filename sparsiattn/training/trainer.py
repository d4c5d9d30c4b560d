"""The training loop over stages, epochs and updates, built on Hugging Face accelerate and timm."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsiattn.errors import DataError, InvalidOption, TrainingDiverged
from sparsiattn.patching.handle import Patch, unpatch
from sparsiattn.runtime.site_runtime import is_planner_key
from sparsiattn.training import checkpoint, keep_schedule, sharding
from sparsiattn.training.checkpoint import TrainState
from sparsiattn.training.data import Loader, loader
from sparsiattn.training.evaluation import evaluate
from sparsiattn.training.logs import Log
from sparsiattn.training.preprocess import mixes
from sparsiattn.training.processes import accelerated
from sparsiattn.training.recipe import Recipe
from sparsiattn.training.result import TrainResult
from sparsiattn.training.run_folder import RunFolder
from sparsiattn.training.stage import Stage
from sparsiattn.training.stage_run import StageRun, lengths
from sparsiattn.training.trainable import checkpointing, require_gradients, set_modes

_FIGURES = ("top1", "top5", "dense_top1", "agreement")
"""Figures of an evaluation that go into the log."""


@dataclass(eq=False)
class Trainer:
    """One run of `train`, with its arguments.

    Attributes:
        patch: The model's current patch; `keep_schedule` replaces it between epochs.
        target: The strategy at the end of the keep schedule.
        host: Names of the model's own weights that the user has not frozen.
        state: The progress of training.
    """

    patch: Patch
    recipe: Recipe
    data: Any
    eval_data: Any
    out: Path | None
    teacher: nn.Module | None
    on_log: Callable[[dict[str, Any]], Any] | None

    def __post_init__(self) -> None:
        self.model, self.target, self.state = self.patch.model, self.patch.strategy, TrainState()
        self.host = {
            name
            for name, weight in self.model.named_parameters()
            if weight.requires_grad and not is_planner_key(name)
        }

    def run(self, resume: bool | str) -> TrainResult:
        """Run all stages, from the start or from a checkpoint."""
        identity = checkpoint.run_identity(self.patch, self.recipe)
        with ExitStack() as stack:
            self.accelerator = stack.enter_context(accelerated(self.recipe))
            self.world, main = self.accelerator.num_processes, self.accelerator.is_main_process
            self.log = Log(self.out, self.on_log) if main else Log(None, None)
            stack.callback(self.log.close)
            self.folder = RunFolder(self.out, self.accelerator, identity)
            self._check()
            state = self.folder.find(resume)
            self._get_teacher(resumed=state is not None)
            self.state = state or self.state
            self.log.resume(self.state)
            if self.recipe.tensorboard and main:
                self.log.start_board(self.state.step)
            if state is not None:
                self.folder.load_weights(self.model)
            if not self.state.done:
                self._stages(resumed=state is not None)
        return TrainResult(self.log.rows, self.state.best, self.state.last, self.out)

    def _check(self) -> None:
        """Check all stages before the first one starts."""
        if self.recipe.batch_size % self.world:
            raise InvalidOption(
                f"batch_size is divided among the {self.world} processes and must be a multiple of "
                f"their number, got {self.recipe.batch_size}"
            )
        for stage in self.recipe.stages:
            require_gradients(self.patch, stage, self.host)
            if stage.keep_epochs is not None:
                keep_schedule.check(self.patch)
            if sharding.is_sharded(self.accelerator):
                sharding.check(self.patch, stage)

    def _get_teacher(self, resumed: bool) -> None:
        """Set the teacher: the user's, or a copy of the model with its initial weights.

        The copy is stored with the checkpoints, as a resumed run does not have the initial weights.
        No copy is needed while the backbone is frozen: the model itself is the teacher then.
        """
        distils = any(s.distils for s in self.recipe.stages if s.trainable != "planners")
        if self.teacher is None and distils:
            self.teacher = unpatch(deepcopy(self.model))
            self.folder.keep_teacher(self.teacher, resumed)
        if self.teacher is not None:
            self.teacher.to(self.accelerator.device).eval().requires_grad_(False)

    def _stages(self, resumed: bool) -> None:
        first = self.state.stage
        for index, stage in enumerate(self.recipe.stages[first:], first):
            if index != first:
                self.state.stage, self.state.update, self.state.epoch = index, 0, 0
            with checkpointing(self.model, stage.grad_checkpointing):
                self._stage(stage, resumed=resumed and index == first)
        self.state.done = True
        self.folder.finish(self.state)

    def _stage(self, stage: Stage, resumed: bool) -> None:
        batches = self._loader()
        per_epoch = self._per_epoch(batches)
        for later in self.recipe.stages[self.state.stage :]:
            lengths(later, per_epoch)  # raises now for an error in a later stage
        run = self._stage_run(stage, per_epoch)
        if resumed:
            self.folder.restore(run)
        while self.state.update < run.total:
            if self._change_keep_rates(stage, run):
                run = self._stage_run(stage, per_epoch).continue_from(run)
            self._epoch(run, batches)
        run.finish()
        self.accelerator.free_memory()

    def _stage_run(self, stage: Stage, per_epoch: int | None) -> StageRun:
        require_gradients(self.patch, stage, self.host)
        self.accelerator.free_memory()
        teacher = self.teacher if stage.distils else None
        return StageRun(self.model, stage, teacher, self.accelerator, per_epoch)

    def _loader(self) -> Any:
        recipe, augment = self.recipe, dict(self.recipe.augment)
        if mixes(augment):
            # with mixup, labels are mixed and smoothed before the loss gets them
            stage = recipe.stages[self.state.stage]
            augment.setdefault("label_smoothing", stage.label_smoothing)
        share = (self.accelerator.process_index, self.world)
        options = {**self._reading(), "seed": recipe.seed, "share": share, "augment": augment}
        return loader(self.data, self.model, split="train", training=True, **options)

    def _reading(self) -> dict[str, Any]:
        """Options of the loader for training and evaluation."""
        recipe = self.recipe
        return {
            "batch_size": recipe.batch_size // self.world,
            "workers": recipe.workers,
            "image_size": recipe.image_size,
            "augment": recipe.augment,
        }

    def _per_epoch(self, batches: Any) -> int | None:
        """Number of updates in one epoch; None if unknown."""
        try:
            count = len(batches)
        except TypeError:
            return None
        if count < self.recipe.accumulation:
            raise DataError(
                f"one update needs accumulation={self.recipe.accumulation} batches, but an epoch "
                f"has {count}: lower accumulation or batch_size, or pass more data"
            )
        return count // self.recipe.accumulation

    def _change_keep_rates(self, stage: Stage, run: StageRun) -> bool:
        """Patch the model again if the keep rate changes in this epoch; returns whether it did."""
        if stage.keep_epochs is None:
            return False
        strategy = keep_schedule.at_epoch(self.target, self.state.epoch, stage.keep_epochs)
        if strategy == self.patch.strategy:
            return False
        run.gather()
        self.patch = keep_schedule.repatch(self.patch, strategy)
        return True

    def _epoch(self, run: StageRun, batches: Any) -> None:
        """Run the rest of an epoch, at most to the end of the stage."""
        state, before, every = self.state, self.state.update, self.recipe.checkpoint_steps
        set_modes(run.model, run.stage)
        for group in self._groups(batches):
            row = self._update(run, group)
            state.end_update(len(group), row["loss"])
            self.log.add(row)
            if state.update >= run.total:
                break
            if every is not None and state.step % every == 0:
                run.gather()
                self.folder.save(state, self.patch, run)
        if state.update == before and not state.batch:  # not after resuming at an epoch's end
            raise DataError(
                f"epoch {state.epoch} of stage {run.stage.name!r} had fewer than "
                f"{self.recipe.accumulation} batches, too few for one update. Pass batches as a "
                "list or another object that can be iterated repeatedly, not as a generator"
            )
        self._end_epoch(run)

    def _groups(self, batches: Any) -> Iterator[list[tuple[Tensor, Tensor]]]:
        """Yield the batches of each update; remaining batches of an epoch are skipped."""
        batches.set_epoch(self.state.seen_epochs)
        size = self.recipe.accumulation
        rest = iter(self._rest(batches))
        while len(group := list(islice(rest, size))) == size:
            yield group

    def _rest(self, batches: Any) -> Any:
        """The remaining batches of an epoch.

        A resumed epoch is opened with the random state of its start, for loaders that draw their
        order from it.
        """
        done = self.state.batch
        if not done:
            self.folder.epoch_rng = checkpoint.rng_state()
            return batches
        if isinstance(batches, Loader) and batches.order is not None:
            from accelerate import skip_first_batches

            return skip_first_batches(batches, done)
        rng = checkpoint.rng_state()
        checkpoint.set_rng_state(self.folder.epoch_rng)
        rest = iter(batches)
        skipped = sum(1 for _ in islice(rest, done))
        checkpoint.set_rng_state(rng)
        if skipped < done:
            raise DataError(
                f"an epoch had at least {done} batches before, but has {skipped} now: resume with "
                "the same data"
            )
        return rest

    def _update(self, run: StageRun, group: list[Any]) -> dict[str, Any]:
        """Make one update, and return its row of the log.

        Raises:
            TrainingDiverged: A loss or the gradient is not finite; the weights are not changed.
        """
        state, weights = self.state, run.stage.losses
        parts: list[Tensor] = []
        lr = run.begin(state.update)
        for images, labels in group:
            with self.accelerator.accumulate(run.objective):
                losses = run.losses(images, labels)
                parts.append(torch.stack([loss.detach().float() for loss in losses.values()]))
                last = self.accelerator.sync_gradients
                if last:
                    # over the batches of the update and over processes
                    means = self.accelerator.reduce(torch.stack(parts).mean(0), "mean")
                    values = dict(zip(weights, means.tolist(), strict=True))
                    self._check_finite(values, run)
                total = torch.stack([weights[name] * loss for name, loss in losses.items()]).sum()
                self.accelerator.backward(total)
                if last:
                    self._check_finite(run.clip(), run)
                run.optimizer.step()
                run.optimizer.zero_grad()
        run.end()
        loss = sum(weights[name] * value for name, value in values.items())
        place = {"stage": run.stage.name, "epoch": state.epoch, "step": state.step + 1}
        return {**place, "lr": lr, "loss": loss, "parts": values}

    def _check_finite(self, values: dict[str, float], run: StageRun) -> None:
        """Raise `TrainingDiverged` for a value that is not finite.

        The values are equal in all processes, so all of them stop.
        """
        bad = [f"{name} is {value}" for name, value in values.items() if not math.isfinite(value)]
        if not bad:
            return
        run.gather()
        raise TrainingDiverged(
            f"step {self.state.step + 1} (stage {run.stage.name!r}, epoch {self.state.epoch}): "
            f"{', '.join(bad)}. Training stopped before that step; {self.folder.what_is_safe()}. "
            "Try a lower lr, a longer warm-up, clip, or mixed_precision='bf16' instead of 'fp16'"
        )

    def _end_epoch(self, run: StageRun) -> None:
        state = self.state
        row: dict[str, Any] = {"stage": run.stage.name, "epoch": state.epoch, "step": state.step}
        row["epoch_loss"] = state.loss_sum / state.loss_count
        run.gather()
        if self.eval_data is not None:
            # in sharded training the model is on another device
            place = {**self._reading(), "device": self.accelerator.device}
            figures = evaluate(run.averaged or self.model, self.eval_data, **place)
            row |= {name: getattr(figures, name) for name in _FIGURES}
        state.end_epoch(row)
        self.log.add(row)
        self.folder.save(state, self.patch, run, best=state.best is row)
