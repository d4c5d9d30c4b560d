"""Setting accelerate up for one run, and leaving no trace of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from sparsiattn.errors import InvalidOption
from sparsiattn.training import checkpoint, sharding
from sparsiattn.training.recipe import Recipe


@contextmanager
def accelerated(recipe: Recipe) -> Iterator[Any]:
    """An ``Accelerator`` for a recipe.

    Random numbers depend on the recipe's seed inside the block and go on afterwards as if it had
    not been.
    """
    try:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState, GradientState, PartialState
        from accelerate.utils import set_seed
    except ImportError as error:
        raise InvalidOption(
            f"training needs accelerate: {error}; pip install 'sparsiattn[train]'"
        ) from error
    used_by_others = AcceleratorState._shared_state != {}
    rng = checkpoint.rng_state()
    cpu = {} if torch.accelerator.is_available() else {"cpu": True}
    # FSDP writes itself over the type, and the next run could not tell what it is on
    state = PartialState(**cpu)
    distributed_type = state.distributed_type
    try:
        try:
            accelerator = Accelerator(
                mixed_precision=recipe.mixed_precision,
                gradient_accumulation_steps=recipe.accumulation,
                step_scheduler_with_optimizer=False,
                **cpu,
            )
        except (ValueError, RuntimeError, ImportError) as error:
            raise InvalidOption(f"accelerate cannot be set up: {error}") from error
        sharding.set_up(accelerator, recipe)
        set_seed(recipe.seed, device_specific=True)
        yield accelerator
    finally:
        checkpoint.set_rng_state(rng)
        if not used_by_others:
            # accelerate keeps its precision for the whole process, and a later run may want another
            AcceleratorState._reset_state()
            GradientState._reset_state()
            state.distributed_type = distributed_type
