"""The folder of a run: writes its checkpoints and finds them again."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparsiattn.errors import CheckpointNotWritten, InvalidOption, MismatchedCheckpoint
from sparsiattn.kernels.atomic_io import recover_folder
from sparsiattn.patching.handle import Patch, patch_of
from sparsiattn.training import checkpoint
from sparsiattn.training.checkpoint import TrainState
from sparsiattn.training.stage_run import StageRun


class RunFolder:
    """The checkpoints ``last`` and ``best`` of one run.

    The first process writes them, with the random states of all processes.

    Args:
        out: The user's folder; None to write nothing.
        accelerator: The run's ``Accelerator``.
        identity: Data that must be equal in this run and the checkpoint to resume from.

    Attributes:
        epoch_rng: Random state at the start of the current epoch.
        saved_step: Step of the last checkpoint; None if there is none.
    """

    def __init__(self, out: Path | None, accelerator: Any, identity: dict[str, Any]) -> None:
        self.out, self.accelerator, self.identity = out, accelerator, identity
        self.epoch_rng = checkpoint.rng_state()
        self.saved_step: int | None = None

    @property
    def last(self) -> Path:
        """The folder of the last checkpoint."""
        assert self.out is not None
        return self.out / checkpoint.LAST

    def what_is_safe(self) -> str:
        """The part of an error message that says which weights are intact."""
        if self.out is None:
            return "the model has the weights of the previous step"
        if self.saved_step is None:
            return "there is no checkpoint yet"
        return f"the last good checkpoint, of step {self.saved_step}, is in {self.last}"

    def find(self, resume: bool | str) -> TrainState | None:
        """Find the state to resume from; None to start from the beginning."""
        if self.out is None:
            if resume is True:
                raise InvalidOption("resume=True needs out=, the folder of the run to resume")
            return None
        self._on_main(self._prepare)
        if not (self.last / checkpoint.STATE).exists():
            if resume is True:
                raise MismatchedCheckpoint(f"{self.last} has no checkpoint to resume from")
            return None
        if resume is False:
            raise InvalidOption(
                f"{self.out} holds a checkpoint, which resume=False would overwrite: pass another "
                "out=, or delete the checkpoint"
            )
        state = checkpoint.load_state(self.last, self.identity)
        self.saved_step = state.step
        return state

    def _prepare(self) -> None:
        assert self.out is not None
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            for name in (checkpoint.LAST, checkpoint.BEST):
                recover_folder(self.out / name)
        except OSError as error:
            raise CheckpointNotWritten(f"{self.out} cannot be used as a folder: {error}") from error

    def keep_teacher(self, teacher: nn.Module, resumed: bool) -> None:
        """Write the teacher's weights; read them in a resumed run."""
        if self.out is None:
            return
        path = self.out / checkpoint.TEACHER
        if resumed:
            checkpoint.load_weights(teacher, path)
            return

        def write() -> None:
            with checkpoint.write_errors(path):
                checkpoint.save_weights(teacher.state_dict(), path)

        self._on_main(write)

    def save(self, state: TrainState, patch: Patch, run: StageRun, best: bool = False) -> None:
        """Write ``last``, and ``best`` after the best epoch; every process must call this."""
        if self.out is None:
            return
        from accelerate.utils import gather_object

        random = gather_object([{"now": checkpoint.rng_state(), "epoch": self.epoch_rng}])
        optimizer = {**run.state(), "rng": {str(rank): rng for rank, rng in enumerate(random)}}
        if best:
            folder, model = self.out / checkpoint.BEST, run.averaged or patch.model
            self._on_main(checkpoint.write, folder, partial(_save_model, patch=patch, model=model))

        def fill(folder: Path) -> None:
            _save_model(folder, patch, patch.model)
            if run.averaged is not None:
                checkpoint.save_weights(run.averaged.state_dict(), folder / checkpoint.EMA)
            torch.save(optimizer, folder / checkpoint.OPTIMIZER)
            checkpoint.save_state(folder / checkpoint.STATE, state, self.identity)

        self._on_main(checkpoint.write, self.last, fill)
        self.saved_step = state.step

    def finish(self, state: TrainState) -> None:
        """Mark ``last`` as complete, and replace its weights by the averaged ones."""
        if self.out is not None:
            self._on_main(checkpoint.finish, self.last, state, self.identity)

    def load_weights(self, model: nn.Module) -> None:
        """Load the weights of the last checkpoint."""
        checkpoint.load_weights(model, self.last / checkpoint.MODEL)

    def restore(self, run: StageRun) -> None:
        """Restore optimizer, averaged weights and random state from the last checkpoint."""
        if run.averaged is not None:
            checkpoint.load_weights(run.averaged, self.last / checkpoint.EMA)
        state = checkpoint.load_tensors(self.last / checkpoint.OPTIMIZER)
        run.load_state(state)
        rng = state["rng"].get(str(self.accelerator.process_index))
        if rng is not None:  # None for additional processes, which start with a new random state
            checkpoint.set_rng_state(rng["now"])
            self.epoch_rng = rng["epoch"]

    def _on_main(self, action: Callable[..., Any], *arguments: Any) -> None:
        """Run an action in the first process; if it fails, every process raises."""
        failure: Exception | None = None
        if self.accelerator.is_main_process:
            try:
                action(*arguments)
            except CheckpointNotWritten as error:
                failure = error
        failed = torch.tensor(float(failure is not None), device=self.accelerator.device)
        if self.accelerator.reduce(failed, "sum").item():
            raise failure or CheckpointNotWritten("the first process could not write a checkpoint")


def _save_model(folder: Path, patch: Patch, model: nn.Module) -> None:
    """Save the patch, for `sparsiattn.load`, and the model's weights."""
    (patch_of(model) or patch).save(folder)
    checkpoint.save_weights(model.state_dict(), folder / checkpoint.MODEL)
