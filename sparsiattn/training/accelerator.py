"""Setting accelerate up for one run, and leaving no trace of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from sparsiattn.errors import InvalidOption
from sparsiattn.training import checkpoint as saved
from sparsiattn.training import sharding
from sparsiattn.training.recipe import Recipe


@contextmanager
def accelerated(recipe: Recipe) -> Iterator[Any]:
    """An ``Accelerator`` for a recipe; random numbers depend on the recipe's seed inside the block
    and go on afterwards as if it had not been."""
    try:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState, GradientState, PartialState
        from accelerate.utils import set_seed
    except ImportError as error:
        raise InvalidOption(
            f"training needs accelerate: {error}; pip install 'sparsiattn[train]'"
        ) from error
    others = AcceleratorState._shared_state != {}
    before = saved.rng_state()
    # FSDP writes itself over it there, and the next run could not tell what it is on
    state = PartialState(**_place())
    kind = state.distributed_type
    try:
        accelerator = _make(Accelerator, recipe)
        sharding.set_up(accelerator, recipe)
        set_seed(recipe.seed, device_specific=True)
        yield accelerator
    finally:
        saved.set_rng_state(before)
        if not others:
            # accelerate keeps its precision for the whole process, and a later run may want another
            AcceleratorState._reset_state()
            GradientState._reset_state()
            state.distributed_type = kind


def _place() -> dict[str, bool]:
    return {} if torch.accelerator.is_available() else {"cpu": True}


def _make(kind: Any, recipe: Recipe) -> Any:
    try:
        return kind(
            mixed_precision=recipe.mixed_precision,
            gradient_accumulation_steps=recipe.accumulation,
            step_scheduler_with_optimizer=False, **_place(),
        )  # fmt: skip
    except (ValueError, RuntimeError, ImportError) as error:
        raise InvalidOption(f"accelerate cannot be set up: {error}") from error
