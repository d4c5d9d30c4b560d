"""`train`: fine-tune a patched model, with its dense self as teacher."""

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
    """Train a patched model as a recipe says: planners, backbone or both.

    The model keeps its device and comes back patched, with the trained weights (their moving
    average where the last stage has one), in the mode and with the ``requires_grad`` it had.
    Several processes (torchrun, ``accelerate launch``) train together, by DistributedDataParallel
    or, where accelerate is told so, sharded (FSDP2); then the model has the trained weights at the
    ends of epochs, at checkpoints and when this returns.

    Args:
        model: A classifier, patched or not; then it gets the recipe's strategy.
        data: Whatever `sparsiattn.training.data.loader` takes: folders, tars, datasets, or ready
            batches (images ``[B, C, H, W]``, labels ``[B]`` int64 or ``[B, classes]`` float), of
            which every process takes its share whole.
        recipe: A `Recipe`, a name (see `sparsiattn.training.recipes`), a file, or a dict; None for
            one that fits the patch.
        eval_data: Like ``data``; the model is evaluated on it after every epoch.
        out: A folder for checkpoints (``last``, ``best``: safetensors, and what `sparsiattn.load`
            reads) and ``log.jsonl``.
        resume: ``"auto"`` goes on from ``out/last`` if there is one, True requires it, False
            refuses it. A run that goes on gives the same numbers, bit for bit, as one that was
            never stopped, on the same machine.
        teacher: Another dense model; by default the model itself as it was before. While the
            backbone is frozen that takes no memory, else it is a copy.
        on_log: Called with every row of the log.
        **overrides: Fields of the recipe, see `Recipe.changed`.

    Returns:
        The log, and what became of the last and the best epoch.

    Raises:
        InvalidOption: For a recipe that does not fit.
        DataError: For data that does not fit.
        TrainingDiverged: At the first loss that is not finite, before it can do harm.
        MismatchedCheckpoint: For a checkpoint of another run.
        CheckpointNotWritten: For a full disk.

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
    """The recipe that the user names, or one that fits the patch."""
    if recipe is not None:
        return Recipe.load(recipe)
    stages = Recipe.load("sparsifiner_deit_small").stages
    if patch is not None and not patch.has_learned_planners:
        if has_planners(patch.model):
            stages = Recipe.load("dynamicvit_deit_small").stages
        else:
            stages = (replace(stages[-1], epochs=30),)
    # numbers of the paper that do not depend on its model and batch size; augmentation for large
    # images would harm small ones
    stages = tuple(replace(stage, warmup_epochs=None, warmup_lr=0.0) for stage in stages)
    return Recipe("connectivity" if patch is None else None, stages=stages)


@contextmanager
def _patched(model: nn.Module, recipe: Recipe) -> Iterator[Patch]:
    """The model's patch, or a new one, which stays unless nothing could be trained."""
    patch = patch_of(model)
    if patch is not None:
        _check_same(patch, recipe)
        yield patch
        return
    if recipe.strategy is None:
        raise InvalidOption(
            "train() needs a patched model or a recipe with a strategy: patch(model, ...) first"
        )
    patch = apply.patch_quietly(model, recipe.strategy, **recipe.options)
    # torch counts in-place changes of a tensor: an optimizer's step shows
    versions = [weight._version for weight in model.parameters()]
    try:
        yield patch
    except BaseException:
        present = patch_of(model)  # another one where keep rates changed between epochs
        untouched = versions == [weight._version for weight in model.parameters()]
        if untouched and present is not None:
            present.unpatch()
        raise


def _check_same(patch: Patch, recipe: Recipe) -> None:
    if recipe.strategy is None:
        return
    kind = REGISTRY.get("strategies", recipe.strategy)
    names = kind.option_names()  # the others are those of `patch` itself
    strategy = kind.build({n: v for n, v in recipe.options.items() if n in names})
    if patch.strategy != strategy:
        raise InvalidOption(
            f"the model is patched with {patch.strategy}, the recipe is for {strategy}: unpatch() "
            "first, or change the recipe's strategy to None to train what is there"
        )
