"""Where a run keeps its checkpoints, and how it finds them again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparsiattn.errors import CheckpointNotWritten, InvalidOption, MismatchedCheckpoint
from sparsiattn.kernels.atomic_io import recover_folder
from sparsiattn.patching.handle import Patch
from sparsiattn.training import checkpoint as saved
from sparsiattn.training.stage_run import Running


class Keeper:
    """``last`` and ``best`` of one run, written by the first process; random numbers by each."""

    def __init__(self, out: Path | None, accelerator: Any, about: dict[str, Any]) -> None:
        self.out, self.accelerator, self.about = out, accelerator, about
        self.epoch_rng = saved.rng_state()
        self.kept: int | None = None

    @property
    def last(self) -> Path:
        assert self.out is not None
        return self.out / saved.LAST

    def words(self) -> str:
        """What is safe, for errors."""
        if self.out is None:
            return "the model has the weights of the step before"
        if self.kept is None:
            return "there was no checkpoint yet"
        return f"the last good checkpoint, of step {self.kept}, is in {self.last}"

    def find(self, resume: bool | str) -> saved.Progress | None:
        """The progress to go on from, None to start anew."""
        if self.out is None:
            if resume is True:
                raise InvalidOption("resume=True needs out=, the folder of the run to go on with")
            return None
        self._on_main(self._prepare)
        there = (self.last / saved.STATE).exists()
        if not there:
            if resume is True:
                raise MismatchedCheckpoint(f"{self.last} has no checkpoint to resume from")
            return None
        if resume is False:
            raise InvalidOption(
                f"{self.out} holds a checkpoint, and resume=False would overwrite it: give another "
                "out=, or delete it"
            )
        found = saved.load_state(self.last, self.about)
        self.kept = found.step
        return found

    def _prepare(self) -> None:
        assert self.out is not None
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            for name in (saved.LAST, saved.BEST):
                recover_folder(self.out / name)
        except OSError as error:
            raise CheckpointNotWritten(f"{self.out} cannot be used as a folder: {error}") from error

    def teacher(self, teacher: nn.Module, resumed: bool) -> None:
        """Write the teacher's weights, or read them back."""
        if self.out is None:
            return
        path = self.out / saved.TEACHER
        if resumed:
            saved.load_weights(teacher, path)
            return

        def write() -> None:
            with saved.write_errors(path):
                saved.save_weights(teacher.state_dict(), path)

        self._on_main(write)

    def keep(self, at: saved.Progress, live: Patch, run: Running, best: bool = False) -> None:
        """Write ``last``, and ``best`` where the epoch was."""
        if self.out is None:
            return
        state, rng = run.state(), self._gathered_rng(at)
        if best:
            place, model = self.out / saved.BEST, run.averaged or live.model
            self._on_main(lambda: saved.write(place, lambda folder: _best(folder, live, model)))

        def fill(folder: Path) -> None:
            live.save(folder)
            saved.save_weights(live.model.state_dict(), folder / saved.MODEL)
            if run.averaged is not None:
                saved.save_weights(run.averaged.state_dict(), folder / saved.EMA)
            torch.save({**state, "rng": rng}, folder / saved.OPTIMIZER)
            saved.save_state(folder / saved.STATE, at, self.about)

        self._on_main(lambda: saved.write(self.last, fill))
        self.kept = at.step

    def finish(self, at: saved.Progress) -> None:
        """Note in ``last`` that the run is complete; its weights become the averaged ones."""
        if self.out is None:
            return
        self._on_main(lambda: saved.finish(self.last, at, self.about))

    def weights(self, model: nn.Module) -> None:
        saved.load_weights(model, self.last / saved.MODEL)

    def restore(self, run: Running) -> None:
        """Optimizer, averaged weights and random numbers of the checkpoint."""
        if run.averaged is not None:
            saved.load_weights(run.averaged, self.last / saved.EMA)
        state = saved.load_tensors(self.last / saved.OPTIMIZER)
        run.load_state(state)
        mine = state["rng"].get(str(self.accelerator.process_index))
        if mine is not None:  # more processes than before: theirs are new
            saved.set_rng_state(mine["now"])
            self.epoch_rng = mine["epoch"]

    def note_epoch(self) -> None:
        """Remember the random numbers with which an epoch begins."""
        self.epoch_rng = saved.rng_state()

    def rewind_epoch(self) -> None:
        saved.set_rng_state(self.epoch_rng)

    def _gathered_rng(self, at: saved.Progress) -> dict[str, Any]:
        from accelerate.utils import gather_object

        now = {"now": saved.rng_state(), "epoch": self.epoch_rng}
        found = gather_object([now]) if self.accelerator.num_processes > 1 else [now]
        return {str(rank): state for rank, state in enumerate(found)}

    def _on_main(self, action: Any) -> None:
        """Done by the first process; where it fails all of them raise instead of waiting."""
        failure: Exception | None = None
        if self.accelerator.is_main_process:
            try:
                action()
            except CheckpointNotWritten as error:
                failure = error
        failed = torch.tensor(float(failure is not None), device=self.accelerator.device)
        if self.accelerator.reduce(failed, "sum").item():
            raise failure or CheckpointNotWritten("the first process could not write a checkpoint")


def _best(folder: Path, live: Patch, model: nn.Module) -> None:
    """What is needed to use the model: `sparsiattn.load` reads the folder, its weights are here."""
    from sparsiattn.patching.handle import patch_of

    (patch_of(model) or live).save(folder)
    saved.save_weights(model.state_dict(), folder / saved.MODEL)
