"""Setting accelerate up for one run, and leaving no trace of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from sparsiattn.errors import InvalidOption
from sparsiattn.training import checkpoint as saved
from sparsiattn.training.recipe import Recipe


@contextmanager
def accelerated(recipe: Recipe) -> Iterator[Any]:
    """An ``Accelerator`` for a recipe; random numbers depend on the recipe's seed inside the block
    and go on afterwards as if it had not been."""
    try:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState, GradientState
        from accelerate.utils import set_seed
    except ImportError as error:
        raise InvalidOption(
            f"training needs accelerate: {error}; pip install 'sparsiattn[train]'"
        ) from error
    others = AcceleratorState._shared_state != {}
    before = saved.rng_state()
    try:
        accelerator = _make(Accelerator, recipe)
        _refuse_sharded(accelerator)
        set_seed(recipe.seed, device_specific=True)
        yield accelerator
    finally:
        saved.set_rng_state(before)
        if not others:
            # accelerate keeps its precision for the whole process, and a later run may want another
            AcceleratorState._reset_state()
            GradientState._reset_state()


def _make(kind: Any, recipe: Recipe) -> Any:
    options: dict[str, Any] = {"cpu": True} if not torch.accelerator.is_available() else {}
    try:
        return kind(
            mixed_precision=recipe.mixed_precision,
            gradient_accumulation_steps=recipe.accumulation,
            step_scheduler_with_optimizer=False, **options,
        )  # fmt: skip
    except (ValueError, RuntimeError, ImportError) as error:
        raise InvalidOption(f"accelerate cannot be set up: {error}") from error


def _refuse_sharded(accelerator: Any) -> None:
    kind = str(getattr(accelerator.distributed_type, "value", accelerator.distributed_type))
    if kind not in ("NO", "MULTI_CPU", "MULTI_GPU"):
        raise InvalidOption(
            f"train() runs in one process or by DistributedDataParallel, accelerate is set up for "
            f"{kind}: sharded checkpoints are not written yet"
        )
