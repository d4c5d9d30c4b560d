"""`train`: fine-tune a patched model, with its dense self as teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

from torch import nn

from sparsiattn.errors import InvalidOption
from sparsiattn.patching.apply import patch
from sparsiattn.patching.handle import Patch, patch_of
from sparsiattn.registry.registry import REGISTRY
from sparsiattn.runtime.patch_state import unwrap
from sparsiattn.training.recipe import Recipe, Stage
from sparsiattn.training.trainable import has_planners, left_as_found

Source = str | PathLike[str] | Mapping[str, Any] | Recipe


@dataclass(frozen=True)
class TrainResult:
    """What `train` did.

    history: the rows of the log: one an update (``stage, epoch, step, lr, loss, parts``), and one
    an epoch (``epoch_loss``, and with eval_data ``top1, dense_top1, agreement``). best, last: rows
    of the best epoch (by top-1, without eval_data by the epoch's loss in the last stage) and of the
    last one. path: the folder with ``last/``, ``best/`` and ``log.jsonl``.
    """

    history: list[dict[str, Any]]
    best: dict[str, Any] | None
    last: dict[str, Any]
    path: Path | None

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "path": None if self.path is None else str(self.path)}

    def __str__(self) -> str:
        lines = [f"{self.last['step']} updates, last epoch: {_said(self.last)}"]
        if self.best is not None:
            lines.append(f"best: {_said(self.best)}, after {self.best['step']} updates")
        if self.path is not None:
            lines.append(f"written to {self.path}")
        return "\n".join(lines)


def _said(row: dict[str, Any]) -> str:
    accuracy = row.get("top1")
    return f"loss {row['epoch_loss']:.4f}" + ("" if accuracy is None else f", top-1 {accuracy:.2f}")


def train(
    model: nn.Module,
    data: Any,
    *,
    recipe: Source | None = None,
    eval_data: Any = None,
    out: str | PathLike[str] | None = None,
    resume: bool | str = "auto",
    teacher: nn.Module | None = None,
    on_log: Callable[[dict[str, Any]], Any] | None = None,
    **overrides: Any,
) -> TrainResult:
    """Train a patched model as a recipe says: planners, backbone or both.

    model: a classifier, patched or not (then the recipe's strategy is put on). data, eval_data:
    whatever `sparsiattn.training.data.loader` takes: folders, tars, datasets, or ready batches
    (images ``[B, C, H, W]``, labels ``[B]`` int64 or ``[B, classes]`` float), of which every
    process takes its share whole. recipe: a `Recipe`, a name (see `sparsiattn.training.recipes`), a
    file, or a dict; None for one that fits the patch. out: a folder for checkpoints (``last``,
    ``best``: safetensors, and what `sparsiattn.load` reads) and ``log.jsonl``. resume: ``"auto"``
    goes on from ``out/last`` if there is one, True requires it, False refuses it. A run that goes
    on gives the same numbers, bit for bit, as one that was never stopped, on the same machine.
    teacher: another dense model; by default the model itself as it was given. While the backbone
    is frozen that takes no memory, else it is a copy. on_log: called with every row. overrides:
    fields of the recipe, see `Recipe.changed`.

    The model keeps its device and comes back patched, with the trained weights (their moving
    average where the last stage has one), in the mode and with the ``requires_grad`` it had.
    Several processes (torchrun, ``accelerate launch``) train together, by DistributedDataParallel
    or, where accelerate is told so, sharded (FSDP2); then the model has the trained weights at the
    ends of epochs, at checkpoints and when this returns.

    Raises `InvalidOption` for a recipe that does not fit, `DataError` for data that does not,
    `TrainingDiverged` at the first loss that is not finite, before it can do harm,
    `MismatchedCheckpoint` for a checkpoint of another run, `CheckpointNotWritten` for a full disk.

    >>> import torch, sparsiattn
    >>> from sparsiattn.testing.hosts import tiny_images, tiny_vit
    >>> model = tiny_vit()
    >>> _ = sparsiattn.patch(model, k=0.2)
    >>> batches = [(tiny_images(4), torch.tensor([0, 1, 2, 3]))]
    >>> result = train(model, batches, epochs=2)
    >>> [row["stage"] for row in result.history if "epoch_loss" in row]
    ['predictor', 'predictor', 'backbone', 'backbone']
    """
    from sparsiattn.training.trainer import Trainer

    host = unwrap(model)
    plan = chosen(recipe, patch_of(host)).changed(overrides)
    if resume not in ("auto", True, False):
        raise InvalidOption(f"resume must be 'auto', True or False, got {resume!r}")
    folder = None if out is None else Path(out)
    own = nullcontext() if teacher is None else left_as_found(teacher)
    with left_as_found(host), own, _patched(host, plan) as live:
        trainer = Trainer(live, plan, data, eval_data, folder, teacher, on_log)
        return trainer.run(resume)


def chosen(recipe: Source | None, live: Patch | None) -> Recipe:
    """The recipe asked for, or one that fits the patch."""
    if recipe is not None:
        return Recipe.load(recipe)
    if live is None or live.has_learned_planners:
        found = Recipe.load("sparsifiner_deit_small")
    elif has_planners(live.model):
        found = Recipe.load("dynamicvit_deit_small")
    else:
        stage = Recipe.load("sparsifiner_deit_small").stages[-1]
        found = Recipe(stages=(replace(stage, epochs=30),))
    # numbers of the paper that do not depend on its model and batch size; augmentation for large
    # images would harm small ones
    stages = tuple(_without_warmup(stage) for stage in found.stages)
    own = {"strategy": "connectivity"} if live is None else {}
    return Recipe(stages=stages, **own)  # type: ignore[arg-type]


def _without_warmup(stage: Stage) -> Stage:
    return replace(stage, warmup_epochs=None, warmup_lr=0.0)


@contextmanager
def _patched(model: nn.Module, recipe: Recipe) -> Iterator[Patch]:
    """The model's patch, or a new one, which stays unless nothing could be trained."""
    live = patch_of(model)
    if live is None and recipe.strategy is None:
        raise InvalidOption(
            "train() needs a patched model or a recipe with a strategy: patch(model, ...) first"
        )
    if live is not None:
        _check_same(live, recipe)
        yield live
        return
    assert recipe.strategy is not None
    live = patch(model, recipe.strategy, **recipe.options)
    before = [weight._version for weight in model.parameters()]
    try:
        yield live
    except BaseException:
        if before == [weight._version for weight in model.parameters()]:
            found = patch_of(model)
            if found is not None:
                found.unpatch()
        raise


def _check_same(live: Patch, recipe: Recipe) -> None:
    if recipe.strategy is None:
        return
    kind = REGISTRY.get("strategies", recipe.strategy)
    options = {n: v for n, v in recipe.options.items() if n in kind.option_names()}
    wanted = kind.build(options)
    if live.strategy != wanted:
        raise InvalidOption(
            f"the model is patched with {live.strategy}, the recipe is for {wanted}: unpatch() "
            "first, or change the recipe's strategy to None to train what is there"
        )
