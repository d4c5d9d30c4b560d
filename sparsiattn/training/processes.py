"""The processes that torchrun or ``accelerate launch`` started, if they did."""

from __future__ import annotations

import gc
import os
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import distributed

from sparsiattn.errors import InvalidOption

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
    state = _connect(device) if waiting() else None
    if not connected():
        return World()
    place = state.device if state is not None and device is None else None
    return World(distributed.get_rank(), distributed.get_world_size(), place)


def leave() -> None:
    """Disconnect, at the end of a program; nothing where nobody was connected."""
    if connected():
        distributed.barrier()  # a process that ends first would pull the connection from the others
        gc.collect()  # models in cycles hold groups, whose threads may not outlive the interpreter
        distributed.destroy_process_group()


def _connect(device: str | torch.device | None) -> Any:
    try:
        from accelerate import PartialState
    except ImportError as error:
        raise InvalidOption(
            f"{os.environ['WORLD_SIZE']} processes were launched, and accelerate, which connects "
            "them, is missing: pip install 'sparsiattn[train]' (or run one process)"
        ) from error
    on_cpu = not torch.cuda.is_available() if device is None else torch.device(device).type == "cpu"
    return PartialState(cpu=on_cpu)
