"""`train`: fine-tune a patched model, with its dense version as teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

from torch import nn

from sparsiattn.errors import InvalidOption
from sparsiattn.patching import apply
from sparsiattn.patching.handle import Patch, patch_of
from sparsiattn.registry.registry import REGISTRY
from sparsiattn.runtime.patch_state import unwrap
from sparsiattn.training.recipe import Recipe
from sparsiattn.training.result import TrainResult
from sparsiattn.training.trainable import has_planners, settings_restored
from sparsiattn.training.trainer import Trainer

RecipeSource = str | PathLike[str] | Mapping[str, Any] | Recipe


def train(
    model: nn.Module,
    data: Any,
    *,
    recipe: RecipeSource | None = None,
    eval_data: Any = None,
    out: str | PathLike[str] | None = None,
    resume: bool | str = "auto",
    teacher: nn.Module | None = None,
    on_log: Callable[[dict[str, Any]], Any] | None = None,
    **overrides: Any,
) -> TrainResult:
    """Train a patched model by a recipe: its planners, its backbone or both.

    The model is trained in place. Afterwards it is patched and has the trained weights (their
    moving average if the last stage has one); device, mode and ``requires_grad`` are restored.
    Several processes (torchrun, ``accelerate launch``) train together with DistributedDataParallel
    or, if accelerate is configured for it, sharded (FSDP2). In sharded training the model is
    updated at the end of epochs, at checkpoints and at the end.

    Args:
        model: A classifier. If it is not patched, it is patched with the recipe's strategy.
        data: The data, in any form that `sparsiattn.training.data.loader` takes: folders, tars,
            datasets, or an iterable of batches (images ``[B, C, H, W]``, labels ``[B]`` int64 or
            ``[B, classes]`` float), which are divided among the processes.
        recipe: A `Recipe`, a name (see `sparsiattn.training.recipes`), a file, or a dict. None for
            a recipe that fits the patch.
        eval_data: Data like ``data``, on which the model is evaluated after every epoch; None for
            no evaluation.
        out: A folder for ``log.jsonl`` and the checkpoints ``last`` and ``best`` (safetensors;
            `sparsiattn.load` reads them). None to write nothing.
        resume: ``"auto"`` resumes from ``out/last`` if there is a checkpoint, True requires one,
            False refuses one. On the same machine a resumed run gives the same results, bit for
            bit, as an uninterrupted one.
        teacher: Another dense model. By default the teacher is the model itself with its initial
            weights; it is copied unless the backbone is frozen.
        on_log: Called with every row of the log.
        **overrides: Fields of the recipe, see `Recipe.changed`.

    Returns:
        The log, and the rows of the last and the best epoch.

    Raises:
        InvalidOption: The recipe is invalid or does not fit the model.
        DataError: The data cannot be read or does not fit the model.
        TrainingDiverged: A loss is not finite; training stops before the update.
        MismatchedCheckpoint: The checkpoint belongs to another run.
        CheckpointNotWritten: A checkpoint cannot be written, for example as the disk is full.

    >>> import torch, sparsiattn
    >>> from sparsiattn.testing.hosts import tiny_images, tiny_vit
    >>> model = tiny_vit()
    >>> _ = sparsiattn.patch(model, k=0.2)
    >>> batches = [(tiny_images(4), torch.tensor([0, 1, 2, 3]))]
    >>> result = train(model, batches, epochs=2)
    >>> [row["stage"] for row in result.history if "epoch_loss" in row]
    ['predictor', 'predictor', 'backbone', 'backbone']
    """
    host = unwrap(model)
    plan = recipe_for(patch_of(host), recipe).changed(overrides)
    if resume not in ("auto", True, False):
        raise InvalidOption(f"resume must be 'auto', True or False, got {resume!r}")
    folder = None if out is None else Path(out)
    teacher_restored = nullcontext() if teacher is None else settings_restored(teacher)
    with settings_restored(host), teacher_restored, _patched(host, plan) as patch:
        return Trainer(patch, plan, data, eval_data, folder, teacher, on_log).run(resume)


def recipe_for(patch: Patch | None, recipe: RecipeSource | None = None) -> Recipe:
    """The user's recipe, or else one that fits the patch."""
    if recipe is not None:
        return Recipe.load(recipe)
    stages = Recipe.load("sparsifiner_deit_small").stages
    if patch is not None and not patch.has_learned_planners:
        if has_planners(patch.model):
            stages = Recipe.load("dynamicvit_deit_small").stages
        else:
            stages = (replace(stages[-1], epochs=30),)
    # warm-up depends on the paper's model and batch size, and its augmentation suits large images
    # only: both are left out
    stages = tuple(replace(stage, warmup_epochs=None, warmup_lr=0.0) for stage in stages)
    return Recipe("connectivity" if patch is None else None, stages=stages)


@contextmanager
def _patched(model: nn.Module, recipe: Recipe) -> Iterator[Patch]:
    """Yield the model's patch or a new one; a new one is undone if an error precedes training."""
    patch = patch_of(model)
    if patch is not None:
        _check_same(patch, recipe)
        yield patch
        return
    if recipe.strategy is None:
        raise InvalidOption(
            "train() needs a patched model or a recipe with a strategy: call patch(model, ...) "
            "first"
        )
    patch = apply.patch_quietly(model, recipe.strategy, **recipe.options)
    # the version counts in-place changes of a tensor, such as an optimizer's step
    versions = [weight._version for weight in model.parameters()]
    try:
        yield patch
    except BaseException:
        present = patch_of(model)  # a new one if keep rates have changed between epochs
        untouched = versions == [weight._version for weight in model.parameters()]
        if untouched and present is not None:
            present.unpatch()
        raise


def _check_same(patch: Patch, recipe: Recipe) -> None:
    if recipe.strategy is None:
        return
    kind = REGISTRY.get("strategies", recipe.strategy)
    names = kind.option_names()  # the other options belong to `patch`
    strategy = kind.build({n: v for n, v in recipe.options.items() if n in names})
    if patch.strategy != strategy:
        raise InvalidOption(
            f"the model is patched with {patch.strategy}, but the recipe is for {strategy}: call "
            "unpatch() first, or set the recipe's strategy to None to train the existing patch"
        )
