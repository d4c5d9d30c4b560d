"""Training checkpoints: folders that are written completely or not at all."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sparsiattn.errors import CheckpointNotWritten, MismatchedCheckpoint
from sparsiattn.kernels import atomic_io
from sparsiattn.patching.handle import Patch
from sparsiattn.registry.registry import REGISTRY
from sparsiattn.serialization.fingerprint import fingerprint
from sparsiattn.training.recipe import Recipe

FORMAT = 1
STATE, MODEL, EMA, OPTIMIZER = "state.json", "model.safetensors", "ema.safetensors", "optimizer.pt"
LAST, BEST, LOG, TEACHER = "last", "best", "log.jsonl", "teacher.safetensors"
_FREE = ("workers", "tensorboard", "checkpoint_steps", "summary", "model", "published")
"""Fields of a recipe that do not change the results."""
_GO_ON = (
    ". Training stopped; earlier checkpoints are intact: free disk space and run the same command "
    "again to resume"
)


@dataclass
class TrainState:
    """The progress of training.

    Attributes:
        stage: Index of the stage.
        epoch: Epoch within the stage.
        update: Number of updates done in the stage.
        batch: Number of batches done in the epoch.
        seen_epochs: Number of epochs done in all stages.
        step: Number of updates done in all stages.
        loss_sum: Sum of the losses of the updates in the current epoch.
        loss_count: Number of these updates.
        best: Row of the log of the best epoch; None before the first epoch ends.
        last: Row of the log of the last epoch.
        done: Whether all stages are complete.
    """

    stage: int = 0
    epoch: int = 0
    update: int = 0
    batch: int = 0
    seen_epochs: int = 0
    step: int = 0
    loss_sum: float = 0.0
    loss_count: int = 0
    best: dict[str, Any] | None = None
    last: dict[str, Any] = field(default_factory=dict)
    done: bool = False

    def end_update(self, batches: int, loss: float) -> None:
        """Count an update."""
        self.update, self.step, self.batch = self.update + 1, self.step + 1, self.batch + batches
        self.loss_sum, self.loss_count = self.loss_sum + loss, self.loss_count + 1

    def end_epoch(self, row: dict[str, Any]) -> None:
        """Store an epoch's row of the log, and start the next epoch."""
        self.epoch, self.seen_epochs, self.batch = self.epoch + 1, self.seen_epochs + 1, 0
        self.loss_sum, self.loss_count, self.last = 0.0, 0, row
        if self.best is None or _is_better(row, self.best):
            self.best = row


def _is_better(row: dict[str, Any], best: dict[str, Any]) -> bool:
    """Whether an epoch is better, by top-1 or else by loss; losses are compared within a stage."""
    if "top1" in row and "top1" in best:
        return bool(row["top1"] > best["top1"])
    return row["stage"] != best["stage"] or bool(row["epoch_loss"] < best["epoch_loss"])


def run_identity(patch: Patch, recipe: Recipe) -> dict[str, Any]:
    """The data that must be equal in a checkpoint and the run that resumes from it."""
    fields = {name: value for name, value in recipe.to_dict().items() if name not in _FREE}
    return {**patch_identity(patch), "recipe": fields}


def patch_identity(patch: Patch) -> dict[str, Any]:
    """Plain data that identifies a patched model: fingerprint and strategy."""
    strategy = json.loads(json.dumps(patch.strategy.to_dict(), default=str))
    return {"model": fingerprint(patch.model), "strategy": strategy}


def _rename_options(stored: dict[str, Any]) -> None:
    """Rename options of earlier versions, in the strategy and the recipe."""
    stored["strategy"] = _current_names(stored["strategy"])
    recipe = stored.get("recipe")
    if isinstance(recipe, dict) and isinstance(recipe.get("strategy"), str):
        named = {"name": recipe["strategy"], "options": recipe["options"]}
        stored["recipe"] = {**recipe, "options": _current_names(named)["options"]}


def _current_names(strategy: Any) -> Any:
    if not (isinstance(strategy, dict) and {"name", "options"} <= strategy.keys()):
        return strategy
    renamed = REGISTRY.get("strategies", strategy["name"]).renamed_options
    options = {renamed.get(k, k): _current_names(v) for k, v in strategy["options"].items()}
    return {**strategy, "options": options}


@contextmanager
def write_errors(path: Path, advice: str = "") -> Iterator[None]:
    """Turn errors of a full or failing disk inside the block into `CheckpointNotWritten`."""
    try:
        yield
    except Exception as error:
        # safetensors and torch wrap the operating system's error in their own errors
        wrapped = type(error).__name__ == "SafetensorError" or "PytorchStreamWriter" in str(error)
        if not (wrapped or isinstance(error, OSError)):
            raise
        raise CheckpointNotWritten(f"{path} cannot be written: {error}{advice}") from error


def write(folder: Path, fill: Callable[[Path], None]) -> None:
    """Replace a checkpoint atomically.

    Args:
        folder: The checkpoint's folder.
        fill: Writes the files of the new checkpoint into the folder it is called with.

    Raises:
        CheckpointNotWritten: Writing failed; the old checkpoint is intact.
    """
    with write_errors(folder, _GO_ON):
        atomic_io.replace_folder(folder, fill)


def save_weights(state: dict[str, Tensor], path: Path) -> None:
    """Write weights as safetensors; the format requires tied weights to be written twice."""
    save_file({name: t.detach().cpu().contiguous().clone() for name, t in state.items()}, path)


@contextmanager
def read_errors(path: Path) -> Iterator[None]:
    """Turn any error inside the block, which reads a file, into `MismatchedCheckpoint`."""
    try:
        yield
    # errors of the system, safetensors, pickle or zip, or keys that differ
    except Exception as error:
        raise MismatchedCheckpoint(f"{path} cannot be read: {error}") from error


def load_weights(model: nn.Module, path: Path) -> None:
    """Load weights of the same model."""
    with read_errors(path):
        model.load_state_dict(load_file(path))


def load_tensors(path: Path) -> Any:
    """Load a file of torch.save that contains only tensors and plain data."""
    with read_errors(path):
        return torch.load(path, map_location="cpu", weights_only=True)


def save_state(path: Path, state: TrainState, identity: dict[str, Any]) -> None:
    """Write the progress of training and the identity of its model and recipe."""
    content = {"format": FORMAT, **identity, "progress": asdict(state)}
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def finish(folder: Path, state: TrainState, identity: dict[str, Any]) -> None:
    """Replace a checkpoint's weights by the averaged ones; safe if the process is killed."""
    with write_errors(folder):
        if (folder / EMA).exists():
            with atomic_io.replacing(folder / MODEL) as temporary:
                shutil.copyfile(folder / EMA, temporary)
        with atomic_io.replacing(folder / STATE) as temporary:
            save_state(temporary, state, identity)


def load_state(folder: Path, identity: dict[str, Any]) -> TrainState:
    """Read the progress of a checkpoint.

    Raises:
        MismatchedCheckpoint: The checkpoint cannot be read, or belongs to another model, strategy
            or recipe than ``identity``.
    """
    path = folder / STATE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        stored = {name: content[name] for name in ("format", *identity)}
        _rename_options(stored)
        state = TrainState(**content["progress"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise MismatchedCheckpoint(f"{path} cannot be read as a checkpoint: {error!r}") from error
    if stored["format"] != FORMAT:
        raise MismatchedCheckpoint(
            f"{path} has format {stored['format']!r}, this version reads {FORMAT}"
        )
    for name, expected in identity.items():
        if stored[name] != expected:
            raise MismatchedCheckpoint(
                f"the checkpoint in {folder} belongs to another {name}: "
                f"{'; '.join(differences(stored[name], expected))}. Resume with the settings it "
                "was made with, or pass another out= (on the command line --out)"
            )
    return state


def differences(there: Any, here: Any, name: str = "") -> list[str]:
    """List where two pieces of plain data differ.

    >>> differences({"k": 0.1, "seed": 1}, {"k": 0.2, "seed": 1})
    ['k 0.1 there, 0.2 here']
    """
    if isinstance(there, dict) and isinstance(here, dict):
        keys = sorted({*there, *here})
        parts = [(f"{name}.{key}".strip("."), there.get(key), here.get(key)) for key in keys]
    elif isinstance(there, list) and isinstance(here, list) and len(there) == len(here):
        pairs = enumerate(zip(there, here, strict=True))
        parts = [(f"{name}[{i}]", first, second) for i, (first, second) in pairs]
    else:
        return [] if there == here else [f"{name} {there!r} there, {here!r} here".strip()]
    return [line for part, first, second in parts for line in differences(first, second, part)]


def rng_state() -> dict[str, Any]:
    """Random states of Python, numpy, torch and every GPU, as data that loads without pickle."""
    kind, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": [kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Restore the random states of `rng_state`."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
