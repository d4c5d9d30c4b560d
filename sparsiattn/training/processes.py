"""Processes of torchrun or ``accelerate launch``, and the setup of accelerate for one run."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import distributed

from sparsiattn.errors import InvalidOption
from sparsiattn.training import checkpoint, sharding
from sparsiattn.training.recipe import Recipe

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """The position of this process among all processes.

    Attributes:
        rank: Rank of this process.
        size: Number of processes.
        device: Device of this process; None if it was not assigned one.
    """

    rank: int = 0
    size: int = 1
    device: torch.device | None = None

    def gather(self, value: T) -> list[T]:
        """The values of all processes, by rank; every process must call this."""
        values = [value] * self.size
        if self.size > 1:
            distributed.all_gather_object(values, value)
        return values


def waiting() -> bool:
    """Whether a launcher started several processes that are not connected yet."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and not connected()


def connected() -> bool:
    """Whether the process group is initialised."""
    return distributed.is_available() and distributed.is_initialized()


def world(device: str | torch.device | None = None) -> World:
    """The world of this process; accelerate connects the processes if they are not yet connected.

    Args:
        device: Device of the model; None to let accelerate choose.
    """
    place = None
    if waiting():
        try:
            from accelerate import PartialState
        except ImportError as error:
            raise InvalidOption(
                f"{os.environ['WORLD_SIZE']} processes were launched, but accelerate, which "
                "connects them, is missing: pip install 'sparsiattn[train]' (or run one process)"
            ) from error
        gpu = torch.device(device).type != "cpu" if device else torch.cuda.is_available()
        state = PartialState(cpu=not gpu)
        place = state.device if device is None else None
    if not connected():
        return World()
    return World(distributed.get_rank(), distributed.get_world_size(), place)


def leave() -> None:
    """Disconnect at the end of a program; does nothing if processes were not connected."""
    if connected():
        distributed.barrier()  # a process that ends early would break the others' connection
        gc.collect()  # models in cycles hold groups, whose threads must end before the interpreter
        distributed.destroy_process_group()


@contextmanager
def accelerated(recipe: Recipe) -> Iterator[Any]:
    """Yield an ``Accelerator`` for a recipe.

    Random numbers depend on the recipe's seed inside the block; the random state is restored
    afterwards.
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
    # FSDP overwrites the type, which the next run needs
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
            # accelerate keeps its precision for the whole process, but a later run may need another
            AcceleratorState._reset_state()
            GradientState._reset_state()
            state.distributed_type = distributed_type
