"""The loop: stages, epochs and updates, on Hugging Face accelerate and timm's parts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsiattn.errors import DataError, InvalidOption, TrainingDiverged
from sparsiattn.patching.handle import Patch, unpatch
from sparsiattn.training import checkpoint as saved
from sparsiattn.training import keep_schedule as warmdown
from sparsiattn.training import sharding
from sparsiattn.training.accelerator import accelerated
from sparsiattn.training.data import Loader, loader
from sparsiattn.training.evaluation import evaluate
from sparsiattn.training.logs import Log
from sparsiattn.training.loop import TrainResult
from sparsiattn.training.recipe import Recipe, Stage
from sparsiattn.training.run_folder import Keeper
from sparsiattn.training.stage_run import Running, lengths
from sparsiattn.training.trainable import checkpointing, choose, is_planner, set_modes


class Trainer:
    """One run of `train`."""

    def __init__(
        self, live: Patch, recipe: Recipe, data: Any, eval_data: Any, out: Path | None,
        teacher: nn.Module | None, on_log: Callable[[dict[str, Any]], Any] | None,
    ) -> None:  # fmt: skip
        self.live, self.recipe, self.data, self.eval_data = live, recipe, data, eval_data
        self.model, self.target, self.on_log = live.model, live.strategy, on_log
        self.given_teacher = self.teacher = teacher
        self.out, self.progress = out, saved.Progress()
        self.host = {
            name
            for name, weight in self.model.named_parameters()
            if weight.requires_grad and not is_planner(name)
        }
        self.about = saved.identity(live, recipe)

    def run(self, resume: bool | str) -> TrainResult:
        """All stages, from the start or from where a checkpoint is."""
        with accelerated(self.recipe) as self.accelerator, self._logging():
            self.keeper = Keeper(self.out, self.accelerator, self.about)
            self._check()
            found = self.keeper.find(resume)
            self._get_teacher(found is not None)
            if found is not None:
                self.progress = found
            self.log.resume(self.progress.step)
            if self.recipe.tensorboard and self.accelerator.is_main_process:
                self.log.start_board(self.out, self.progress.step)
            self._stages(found)
        return TrainResult(self.log.rows, self.progress.best, self.progress.last, self.out)

    @contextmanager
    def _logging(self) -> Iterator[None]:
        main = self.accelerator.is_main_process
        path = self.out / saved.LOG if self.out is not None and main else None
        self.log = Log(path, self.on_log if main else None)
        try:
            yield
        finally:
            self.log.close()

    def _check(self) -> None:
        """Whatever can be wrong with any stage is said before the first one begins."""
        world = self.accelerator.num_processes
        if self.recipe.batch_size % world:
            raise InvalidOption(
                f"batch_size={self.recipe.batch_size} is of all {world} processes together, and "
                "must be a multiple of their number"
            )
        for stage in self.recipe.stages:
            choose(self.live, stage, self.host)
            if stage.keep_epochs is not None:
                warmdown.check(self.live)
            if sharding.is_sharded(self.accelerator):
                sharding.check(self.live, stage)

    def _get_teacher(self, resumed: bool) -> None:
        """The given one; else a copy of the weights as they were before any stage moved them, kept
        beside the checkpoints, since a run that goes on would not find them in the model."""
        moves = [stage for stage in self.recipe.stages if stage.trainable != "planners"]
        if self.teacher is None and any(stage.distils for stage in moves):
            self.teacher = unpatch(deepcopy(self.model))
            self.keeper.teacher(self.teacher, resumed)
        if self.teacher is not None:
            self.teacher.to(self.accelerator.device).eval().requires_grad_(False)

    def _stages(self, found: saved.Progress | None) -> None:
        if found is not None and found.done:
            self.keeper.weights(self.model)
            return
        for index in range(self.progress.stage, len(self.recipe.stages)):
            stage = self.recipe.stages[index]
            if index != self.progress.stage:
                self.progress.stage, self.progress.update, self.progress.epoch = index, 0, 0
            with checkpointing(self.model, stage.grad_checkpointing):
                self._stage(stage, resumed=found is not None and index == found.stage)
            found = None
        self.progress.done = True
        self.keeper.finish(self.progress)

    def _stage(self, stage: Stage, resumed: bool) -> None:
        if resumed:
            self.keeper.weights(self.model)
        batches = self._loader()
        per_epoch = self._per_epoch(batches)
        for one in self.recipe.stages[self.progress.stage :]:
            lengths(one, per_epoch)  # what is wrong with a later stage is said now
        run = self._running(stage, per_epoch)
        if resumed:
            self.keeper.restore(run)
        while self.progress.update < run.total:
            if self._keep_rates(stage, run):
                run = self._running(stage, per_epoch).go_on_from(run)
            self._epoch(stage, run, batches)
        run.validate_token_plan()
        self.accelerator.free_memory()

    def _running(self, stage: Stage, per_epoch: int | None) -> Running:
        choose(self.live, stage, self.host)
        self.accelerator.free_memory()
        teacher = self._teacher_for(stage)
        return Running(self.model, stage, teacher, self.accelerator, per_epoch)

    def _teacher_for(self, stage: Stage) -> nn.Module | None:
        """None: the model itself is its teacher, which it can be while its backbone rests as it
        was given."""
        untouched = all(s.trainable == "planners" for s in self.recipe.stages)
        alone = self.given_teacher is None and untouched
        return None if alone or not stage.distils else self.teacher

    def _loader(self) -> Any:
        recipe, world = self.recipe, self.accelerator.num_processes
        augment = dict(recipe.augment)
        if any(augment.get(name) for name in ("mixup_alpha", "cutmix_alpha", "cutmix_minmax")):
            # there the labels are mixed, and smoothed, before the loss sees them
            stage = recipe.stages[self.progress.stage]
            augment.setdefault("label_smoothing", stage.label_smoothing)
        return loader(
            self.data, self.model, batch_size=recipe.batch_size // world, split="train",
            training=True, seed=recipe.seed, workers=recipe.workers, augment=augment,
            image_size=recipe.image_size, share=(self.accelerator.process_index, world),
        )  # fmt: skip

    def _per_epoch(self, batches: Any) -> int | None:
        """Updates in one pass over the data, None if nobody knows."""
        try:
            count = len(batches)
        except TypeError:
            return None
        if count < self.recipe.accumulation:
            raise DataError(
                f"the data gives {count} batches an epoch, and one update needs "
                f"accumulation={self.recipe.accumulation} of them"
            )
        return count // self.recipe.accumulation

    def _keep_rates(self, stage: Stage, run: Running) -> bool:
        """Patch the model anew where this epoch keeps another share; says whether that was so."""
        if stage.keep_epochs is None:
            return False
        strategy = warmdown.shrunk(self.target, self.progress.epoch, stage.keep_epochs)
        if strategy == self.live.strategy:
            return False
        run.gather()
        self.live = warmdown.apply(self.live, strategy)
        return True

    def _epoch(self, stage: Stage, run: Running, batches: Any) -> None:
        """The rest of an epoch, up to the end of the stage."""
        at, before = self.progress, self.progress.update
        set_modes(run.model, stage)
        for group in self._groups(batches):
            row = self._update(stage, run, group)
            at.batch += len(group)
            at.update, at.step = at.update + 1, at.step + 1
            at.loss_sum, at.loss_count = at.loss_sum + row["loss"], at.loss_count + 1
            self.log.add(row)
            if at.update >= run.total:
                break
            every = self.recipe.checkpoint_steps
            if every is not None and at.step % every == 0:
                run.gather()
                self.keeper.keep(at, self.live, run)
        if at.update == before and not at.batch:  # else a checkpoint was the last of its epoch
            raise DataError(
                f"epoch {at.epoch} of stage {stage.name!r} gave fewer than "
                f"{self.recipe.accumulation} batches: not one update could be made. Batches must "
                "be a list or something else that can be gone through again, not a generator"
            )
        self._end_epoch(stage, run)

    def _groups(self, batches: Any) -> Iterator[list[tuple[Tensor, Tensor]]]:
        """Batches for one update each; those left over at the end of an epoch are left out."""
        batches.set_epoch(self.progress.seen_epochs)
        size = self.recipe.accumulation
        found = iter(self._rest(batches))
        while len(group := list(islice(found, size))) == size:
            yield group

    def _rest(self, batches: Any) -> Any:
        """What an interrupted epoch has left. Random numbers are those of its start while it is
        opened, for loaders that draw their order from them."""
        done = self.progress.batch
        if not done:
            self.keeper.note_epoch()
            return batches
        if isinstance(batches, Loader) and batches.order is not None:
            from accelerate import skip_first_batches

            return skip_first_batches(batches, done)
        now = saved.rng_state()
        self.keeper.rewind_epoch()
        rest = iter(batches)
        skipped = sum(1 for _ in islice(rest, done))
        saved.set_rng_state(now)
        if skipped < done:
            raise DataError(f"an epoch had at least {done} batches before, and has {skipped} now")
        return rest

    def _update(self, stage: Stage, run: Running, group: list[Any]) -> dict[str, Any]:
        """One step of the optimizer; gives its row of the log. Nothing changes if a loss or the
        gradient is not finite."""
        at, accelerator = self.progress, self.accelerator
        parts: list[Tensor] = []
        lr = run.begin(at.update)
        for images, labels in group:
            with accelerator.accumulate(run.objective):
                found = run.losses(images, labels)
                parts.append(torch.stack([value.detach().float() for value in found.values()]))
                values = self._reduced(parts) if accelerator.sync_gradients else {}
                self._check_finite(values, run)
                accelerator.backward(_total(found, stage))
                if accelerator.sync_gradients:
                    self._check_finite(run.clip(), run)
                run.optimizer.step()
                run.optimizer.zero_grad()
        run.end()
        loss = sum(stage.losses[name] * value for name, value in values.items())
        place = {"stage": stage.name, "epoch": at.epoch, "step": at.step + 1}
        return {**place, "lr": lr, "loss": loss, "parts": values}

    def _reduced(self, parts: list[Tensor]) -> dict[str, float]:
        """Means over the batches of one update and over processes."""
        mean = self.accelerator.reduce(torch.stack(parts).mean(0), "mean")
        names = self.recipe.stages[self.progress.stage].losses
        return dict(zip(names, mean.tolist(), strict=True))

    def _check_finite(self, values: dict[str, float], run: Running) -> None:
        """The same in all processes, so that all of them stop."""
        bad = [f"{name} is {value}" for name, value in values.items() if not math.isfinite(value)]
        if not bad:
            return
        run.gather()
        kept = self.keeper.words()
        raise TrainingDiverged(
            f"step {self.progress.step + 1} (stage {run.stage.name!r}, epoch "
            f"{self.progress.epoch}): {', '.join(bad)}. Training stopped before that step; {kept}. "
            "Try a lower lr, a longer warm-up, clip, or mixed_precision='bf16' instead of 'fp16'"
        )

    def _end_epoch(self, stage: Stage, run: Running) -> None:
        at = self.progress
        row: dict[str, Any] = {"stage": stage.name, "epoch": at.epoch, "step": at.step}
        row["epoch_loss"] = at.loss_sum / at.loss_count
        run.gather()
        if self.eval_data is not None:
            row |= self._evaluated(run.averaged or self.model)
        at.epoch, at.seen_epochs, at.batch = at.epoch + 1, at.seen_epochs + 1, 0
        at.loss_sum, at.loss_count, at.last = 0.0, 0, row
        better = _better(row, at.best)
        if better:
            at.best = row
        self.log.add(row)
        self.keeper.keep(at, self.live, run, best=better)

    def _evaluated(self, model: nn.Module) -> dict[str, Any]:
        recipe = self.recipe
        place = next((weight.device for weight in model.parameters()), self.accelerator.device)
        model.to(self.accelerator.device)  # of sharded training it waits elsewhere
        found = evaluate(
            model, self.eval_data, batch_size=recipe.batch_size // self.accelerator.num_processes,
            workers=recipe.workers, image_size=recipe.image_size, augment=recipe.augment,
        )  # fmt: skip
        model.to(place)
        wanted = ("top1", "top5", "dense_top1", "agreement")
        return {name: getattr(found, name) for name in wanted}


def _total(parts: dict[str, Tensor], stage: Stage) -> Tensor:
    return torch.stack([stage.losses[name] * value for name, value in parts.items()]).sum()


def _better(row: dict[str, Any], best: dict[str, Any] | None) -> bool:
    """By top-1; losses only compare within a stage."""
    if best is None:
        return True
    if "top1" in row and "top1" in best:
        return bool(row["top1"] > best["top1"])
    return row["stage"] != best["stage"] or bool(row["epoch_loss"] < best["epoch_loss"])
