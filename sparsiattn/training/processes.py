"""The processes that torchrun or ``accelerate launch`` started, and accelerate for one run."""

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
    """One process of many, or the only one.

    Attributes:
        rank: Its number.
        size: Number of processes.
        device: Its own, None where nobody gave it one.
    """

    rank: int = 0
    size: int = 1
    device: torch.device | None = None

    def gather(self, value: T) -> list[T]:
        """The values of all processes, by rank; all must call."""
        values = [value] * self.size
        if self.size > 1:
            distributed.all_gather_object(values, value)
        return values


def waiting() -> bool:
    """Whether a launcher started several processes that nobody has connected yet."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and not connected()


def connected() -> bool:
    """Whether this process can talk to others."""
    return distributed.is_available() and distributed.is_initialized()


def world(device: str | torch.device | None = None) -> World:
    """This process among those launched together; accelerate connects them if nobody has yet.

    Args:
        device: Of the model, where the caller wants a certain one.
    """
    place = None
    if waiting():
        try:
            from accelerate import PartialState
        except ImportError as error:
            raise InvalidOption(
                f"{os.environ['WORLD_SIZE']} processes were launched, and accelerate, which "
                "connects them, is missing: pip install 'sparsiattn[train]' (or run one process)"
            ) from error
        gpu = torch.device(device).type != "cpu" if device else torch.cuda.is_available()
        state = PartialState(cpu=not gpu)
        place = state.device if device is None else None
    if not connected():
        return World()
    return World(distributed.get_rank(), distributed.get_world_size(), place)


def leave() -> None:
    """Disconnect, at the end of a program; nothing where nobody was connected."""
    if connected():
        distributed.barrier()  # a process that ends first would pull the connection from the others
        gc.collect()  # models in cycles hold groups, whose threads may not outlive the interpreter
        distributed.destroy_process_group()


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
