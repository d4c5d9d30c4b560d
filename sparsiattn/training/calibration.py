"""Fit learned planners to a model's dense attention, without labels or changes to its weights."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import count, islice
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from sparsiattn.errors import CalibrationDiscarded, InvalidOption, TrainingDiverged
from sparsiattn.kernels.atomic_io import recover_folder
from sparsiattn.patching.handle import Patch, patch_of
from sparsiattn.strategies.base import LearnedPlanner
from sparsiattn.training import checkpoint
from sparsiattn.training.data import loader
from sparsiattn.training.field_kinds import check_counts
from sparsiattn.training.progress import bar
from sparsiattn.training.reconstruction import output_errors, site_losses, start_planners
from sparsiattn.training.sources import is_path

COMPARED_IMAGES = 8  # images of the last batch on which fitted planners are compared


def calibrate(
    model: nn.Module,
    images: Any,
    *,
    steps: int | None = None,
    lr: float = 1e-2,
    batch_size: int = 64,
    seed: int = 0,
    closed_form: bool = True,
    out: str | PathLike[str] | None = None,
    checkpoint_steps: int = 100,
    progress: bool = False,
    on_step: Callable[[int, float], Any] | None = None,
) -> list[float]:
    """Train the planners of a patched model to reproduce its dense attention.

    Planners that are optional (``scores="auto"`` of `connectivity`) are then checked on images of
    the last batch. At a site where the planner does not bring the attention output closer to dense
    attention, its weights are reset to their initial values, with a warning.

    Memory grows with the number of rows of the patterns, as exact attention is recomputed for a few
    rows at a time.

    Args:
        model: A patched model with learned planners.
        images: Batches ``[B, 3, H, W]`` (or tuples that start with such a batch), or a folder, tar
            or dataset that `sparsiattn.training.data.loader` takes. Labels are ignored.
        steps: Number of steps. If there are fewer batches, they are repeated, unless ``images`` is
            an iterator. If None, one step per batch.
        lr: Learning rate of Adam, decayed to zero if ``steps`` is set. Lower it or take more steps
            if the loss increases.
        batch_size: Images per step, for a folder, tar or dataset.
        seed: Seed of the order of images, for a folder, tar or dataset.
        closed_form: Whether to initialise planners in closed form from the second moments of the
            first batch, if the planner supports it and it lowers the loss.
        out: A folder for checkpoints. If it holds a checkpoint, the same call resumes from it, with
            the same results as an uninterrupted run if ``images`` have the same order.
        checkpoint_steps: Number of steps between checkpoints.
        progress: Whether to show a progress bar on stderr.
        on_step: Called with the number of the step and its loss.

    Returns:
        The loss of every step (mean over sites).

    Raises:
        InvalidOption: The model has no learned planners, or there are no images.
        DataError: The images do not fit the model.
        TrainingDiverged: A loss is not finite.
        MismatchedCheckpoint: ``out`` holds a checkpoint of another calibration.
        CheckpointNotWritten: A checkpoint cannot be written, for example as the disk is full.

    Warns:
        CalibrationDiscarded: At some sites the planners were reset.

    >>> import sparsiattn
    >>> from sparsiattn.testing.hosts import tiny_images, tiny_vit
    >>> model = tiny_vit()
    >>> with sparsiattn.patch(model, k=0.2, scores="predictor"):
    ...     losses = calibrate(model, [tiny_images(4)], steps=20)
    >>> losses[-1] < losses[0]
    True
    """
    patch = patch_of(model)
    if patch is None or not patch.has_learned_planners:
        raise InvalidOption(
            "calibrate() needs a model with learned planners, and this model has none: patch it "
            "with a strategy that learns, e.g. patch(model, strategy='connectivity')"
        )
    check_counts(1, steps=steps, checkpoint_steps=checkpoint_steps)
    if not lr > 0:
        raise InvalidOption(f"lr must be above 0, got {lr!r}")
    order: dict[str, Any] = {"batch_size": batch_size, "seed": seed}
    plan = {"steps": steps, "lr": lr, **order, "closed_form": closed_form}
    calibration = Calibration(patch, plan, None if out is None else Path(out), checkpoint_steps)
    if is_path(images) or isinstance(images, Dataset):
        images = loader(images, model, split="train", training=True, labels=False, **order)
    with _gradients_on(calibration.weights), bar("calibrating", steps, shown=progress) as advance:
        for step, loss in calibration.run(images):
            advance(step + 1)
            if on_step is not None:
                on_step(step, loss)
    discarded = calibration.discard_worse()
    if discarded is not None:
        warnings.warn(discarded, CalibrationDiscarded, stacklevel=2)
    return calibration.losses


@contextmanager
def _gradients_on(weights: list[nn.Parameter]) -> Iterator[None]:
    """Make weights require gradients inside the block; restore the setting and drop gradients."""
    with ExitStack() as stack:
        for weight in weights:
            stack.callback(setattr, weight, "grad", None)
            stack.callback(weight.requires_grad_, weight.requires_grad)
            weight.requires_grad_(True)
        yield


@dataclass(eq=False)
class Calibration:
    """One running calibration.

    Attributes:
        patch: The model's patch.
        plan: Arguments of `calibrate` that must equal those of the checkpoint to resume from.
        out: The folder for checkpoints; None for no checkpoints.
        checkpoint_steps: Number of steps between checkpoints.
    """

    patch: Patch
    plan: dict[str, Any]
    out: Path | None
    checkpoint_steps: int

    def __post_init__(self) -> None:
        self.folder = None if self.out is None else self.out / checkpoint.LAST
        planners = (runtime.planner for runtime in self.patch.runtimes)
        self.planners = [planner for planner in planners if isinstance(planner, LearnedPlanner)]
        self.weights = [weight for planner in self.planners for weight in planner.parameters()]
        self.optimizer = torch.optim.Adam(self.weights, self.plan["lr"])
        self.identity = {**checkpoint.patch_identity(self.patch), "calibration": self.plan}
        self.losses: list[float] = []
        self.images: Any = None  # the images of the last batch

    def run(self, batches: Iterable[Any]) -> Iterator[tuple[int, float]]:
        """Run all steps, from a checkpoint on if there is one; yields each step and its loss."""
        if self.folder is not None:
            self._resume(self.folder)
        steps, done = self.plan["steps"], len(self.losses)
        every = self._noted(_repeated(batches, steps))
        for step, images in enumerate(islice(every, done, steps), done):
            if step == 0 and self.plan["closed_form"]:
                start_planners(self.patch, images)
            self._step(step, images)
            due = (step + 1) % self.checkpoint_steps == 0 or step + 1 == steps
            if due and self.folder is not None:
                checkpoint.write(self.folder, self._save)
            yield step, self.losses[-1]
        if self.images is None:
            raise InvalidOption("calibrate() got no images: pass at least one batch [B, C, H, W]")

    def _noted(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Yield the images of every batch, and store those of the last one."""
        for batch in batches:
            self.images = batch[0] if isinstance(batch, (tuple, list)) else batch
            yield self.images

    def discard_worse(self) -> str | None:
        """Reset planners that are not better than the unfitted plan.

        Returns:
            The text of a warning; None if no planner was reset.
        """
        images = self.images
        compared = images[:COMPARED_IMAGES] if isinstance(images, Tensor) else images
        errors = output_errors(self.patch, compared)
        worse = {name: pair for name, pair in errors.items() if pair[0] and not pair[0] < pair[1]}
        if not worse:
            return None
        for runtime in self.patch.runtimes:
            if runtime.site.name in worse:
                runtime.planner.reset_parameters()  # type: ignore[attr-defined]
        fitted, unfitted = (sum(pair) / len(worse) for pair in zip(*worse.values(), strict=True))
        return (
            f"at {len(worse)} of {len(self.planners)} sites the calibrated planners lose "
            f"{fitted:.1%} of attention's output (on images of the last batch), and the selection "
            f"without them loses {unfitted:.1%}: these sites do not use their planners, whose "
            "weights were reset. Patch with scores='predictor' to use them anyway"
        )

    def _step(self, step: int, images: Tensor) -> None:
        if self.plan["steps"]:
            self.optimizer.param_groups[0]["lr"] = self.plan["lr"] * (1 - step / self.plan["steps"])
        loss = torch.stack(site_losses(self.patch, images)).mean()
        value = loss.item()
        if not torch.isfinite(loss):
            raise TrainingDiverged(
                f"the calibration loss is {value} at step {step}; planners have the weights of the "
                "previous step. Look for NaN in the images or the model's attention, or lower lr"
            )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.losses.append(value)

    def _save(self, folder: Path) -> None:
        state = {
            "optimizer": self.optimizer.state_dict(),
            "planners": [planner.state_dict() for planner in self.planners],
            "losses": self.losses,
        }
        torch.save(state, folder / checkpoint.OPTIMIZER)
        progress = checkpoint.TrainState(step=len(self.losses))
        checkpoint.save_state(folder / checkpoint.STATE, progress, self.identity)

    def _resume(self, folder: Path) -> None:
        recover_folder(folder)
        if not (folder / checkpoint.STATE).exists():
            return
        checkpoint.load_state(folder, self.identity)
        state = checkpoint.load_tensors(folder / checkpoint.OPTIMIZER)
        with checkpoint.read_errors(folder):
            for planner, weights in zip(self.planners, state["planners"], strict=True):
                planner.load_state_dict(weights)
            self.optimizer.load_state_dict(state["optimizer"])
            self.losses = list(state["losses"])


def _repeated(batches: Iterable[Any], steps: int | None) -> Iterator[Any]:
    """Yield batches, starting again from the first one if ``steps`` is set and it is possible."""
    for epoch in count():
        if hasattr(batches, "set_epoch"):
            batches.set_epoch(epoch)
        empty = True
        for batch in batches:
            empty = False
            yield batch
        # an iterator is exhausted after one pass
        if steps is None or empty or iter(batches) is batches:
            return
