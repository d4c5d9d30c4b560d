"""Fit learned planners to a model's own attention; no labels, the host's weights untouched."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsiattn.errors import InvalidOption, MismatchedCheckpoint, TrainingDiverged
from sparsiattn.kernels.atomic_io import recover_folder
from sparsiattn.patching.handle import Patch, patch_of
from sparsiattn.strategies.base import LearnedPlanner
from sparsiattn.training import checkpoint as saved
from sparsiattn.training.progress import bar
from sparsiattn.training.reconstruction import site_losses, start_planners


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

    images: batches ``[B, 3, H, W]`` (or ``(batch, ...)`` tuples, whose rest is ignored), or a
    folder, tar or dataset that `sparsiattn.training.data.loader` takes, of which ``batch_size``
    images are drawn for every step in an order that depends on ``seed``; labels are not looked at.
    steps: how many; images are gone through again if there are fewer and they can be, once if None.
    lr: of Adam, decayed to zero over ``steps`` where given. closed_form: begin with weights from
    the second moments of the first batch, where planners know such and they lower the loss. out: a
    folder for a checkpoint every ``checkpoint_steps`` steps; the same call goes on from the one it
    finds there, with the same numbers as if it had never stopped, if ``images`` come in the same
    order. progress: show a bar on stderr. on_step: called with the step and its loss.

    Returns the loss of every step (mean over sites). Memory grows with the rows of the patterns:
    exact attention is computed again from a few rows at a time.

    Raises `InvalidOption` if there is nothing to fit or no image, `DataError` for images that do
    not fit, `TrainingDiverged` at a loss that is not finite, `MismatchedCheckpoint` if ``out``
    holds a checkpoint of another calibration, `CheckpointNotWritten` for a full disk.

    >>> import sparsiattn
    >>> from sparsiattn.testing.hosts import tiny_images, tiny_vit
    >>> model = tiny_vit()
    >>> with sparsiattn.patch(model, k=0.2):
    ...     losses = calibrate(model, [tiny_images(4)], steps=20)
    >>> losses[-1] < losses[0]
    True
    """
    live = patch_of(model)
    planners = [] if live is None else planners_of(live)
    if live is None or not planners:
        raise InvalidOption(
            "calibrate() fits learned planners, and this model has none: patch it with one first, "
            "e.g. patch(model, strategy='connectivity')"
        )
    _check(steps, lr, checkpoint_steps)
    plan = {"steps": steps, "lr": lr, "batch_size": batch_size, "seed": seed,
            "closed_form": closed_form}  # fmt: skip
    weights = [weight for planner in planners for weight in planner.parameters()]
    frozen = [weight.requires_grad for weight in weights]
    for weight in weights:
        weight.requires_grad_(True)
    try:
        fit = Fit(live, planners, plan, None if out is None else Path(out), checkpoint_steps)
        with bar("calibrating", steps, shown=progress) as advance:
            for step, loss in fit.run(_batches(images, model, batch_size, seed)):
                advance(step + 1)
                if on_step is not None:
                    on_step(step, loss)
        return fit.losses
    finally:
        for weight, before in zip(weights, frozen, strict=True):
            weight.requires_grad_(before)
            weight.grad = None


def _batches(images: Any, model: nn.Module, batch_size: int, seed: int) -> Iterable[Any]:
    """Ready batches as they are, without a look at what else they hold."""
    from torch.utils.data import Dataset

    from sparsiattn.training.data import loader
    from sparsiattn.training.sources import is_path

    if not is_path(images) and not isinstance(images, Dataset):
        return images  # type: ignore[no-any-return]
    return loader(
        images, model, batch_size=batch_size, split="train", training=True, seed=seed, labels=False
    )


def planners_of(live: Patch) -> list[LearnedPlanner]:
    return [r.planner for r in live.runtimes if isinstance(r.planner, LearnedPlanner)]


def _check(steps: int | None, lr: float, checkpoint_steps: int) -> None:
    for name, value in (("steps", steps), ("checkpoint_steps", checkpoint_steps)):
        if value is not None and (type(value) is not int or value < 1):
            raise InvalidOption(f"{name} must be an int >= 1, got {value!r}")
    if not lr > 0:
        raise InvalidOption(f"lr must be above 0, got {lr!r}")


@dataclass
class Fit:
    """One calibration under way. plan: what a checkpoint must have in common with it."""

    live: Patch
    planners: list[LearnedPlanner]
    plan: dict[str, Any]
    out: Path | None
    every: int
    losses: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        weights = [weight for planner in self.planners for weight in planner.parameters()]
        self.optimizer = torch.optim.Adam(weights, self.plan["lr"])
        self.about = {**saved.identity_of(self.live), "calibration": self.plan}

    def run(self, batches: Iterable[Any]) -> Iterator[tuple[int, float]]:
        """Steps and their losses, from where a checkpoint is."""
        self._resume()
        steps, done = self.plan["steps"], len(self.losses)
        seen = done
        for batch in islice(_again(batches, steps), done, steps):
            images = batch[0] if isinstance(batch, (tuple, list)) else batch
            if not seen and self.plan["closed_form"]:
                start_planners(self.live, images)
            self._step(seen, images)
            seen += 1
            if self.out is not None and (seen % self.every == 0 or seen == steps):
                self._save(self.out)
            yield seen - 1, self.losses[-1]
        if not self.losses:
            raise InvalidOption("calibrate() got no images: pass at least one batch [B, C, H, W]")

    def _step(self, step: int, images: Tensor) -> None:
        if self.plan["steps"]:
            self.optimizer.param_groups[0]["lr"] = self.plan["lr"] * (1 - step / self.plan["steps"])
        loss = torch.stack(site_losses(self.live, images)).mean()
        value = loss.item()
        if not torch.isfinite(loss):
            raise TrainingDiverged(
                f"calibration's loss is {value} at step {step}; planners have the weights of the "
                "step before. Look for NaN in the images or the model's attention, or lower lr"
            )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.losses.append(value)

    def _save(self, out: Path) -> None:
        def fill(folder: Path) -> None:
            states = [planner.state_dict() for planner in self.planners]
            content = {"optimizer": self.optimizer.state_dict(), "planners": states}
            torch.save({**content, "losses": self.losses}, folder / saved.OPTIMIZER)
            saved.save_state(
                folder / saved.STATE, saved.Progress(step=len(self.losses)), self.about
            )

        saved.write(out / saved.LAST, fill)

    def _resume(self) -> None:
        last = None if self.out is None else self.out / saved.LAST
        if last is None:
            return
        recover_folder(last)
        if not (last / saved.STATE).exists():
            return
        saved.load_state(last, self.about)
        state = saved.load_tensors(last / saved.OPTIMIZER)
        try:
            for planner, weights in zip(self.planners, state["planners"], strict=True):
                planner.load_state_dict(weights)
            self.optimizer.load_state_dict(state["optimizer"])
            self.losses = list(state["losses"])
        except (KeyError, ValueError, RuntimeError) as error:
            raise MismatchedCheckpoint(f"{last} cannot be read: {error}") from error


def _again(batches: Iterable[Any], steps: int | None) -> Iterator[Any]:
    """Batch after batch; from the start again, if that can be, while steps ask for more."""
    epoch = 0
    while True:
        if hasattr(batches, "set_epoch"):
            batches.set_epoch(epoch)
        got = False
        for batch in batches:
            got = True
            yield batch
        epoch += 1
        if steps is None or not got or iter(batches) is batches:
            return
