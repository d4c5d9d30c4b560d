"""Memory that kernels use again from call to call, one set per thread.

Large temporaries that are made anew go back to the system when they are freed, and getting them
again costs a page fault for every 4 KiB: more than the arithmetic on them at a thousand tokens.
"""

from __future__ import annotations

import math
import threading

import torch
from torch import Tensor

# More than this is not kept, in bytes per name.
LARGEST_KEPT = 1 << 25


_FLOAT32 = torch.empty(0)


class Scratch(threading.local):
    """Buffers by name.

    What is in one is lost at the next request of that name by the same thread, so nothing that
    autograd keeps, and nothing that is returned to a host, may lie in one.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[str, torch.dtype], Tensor] = {}

    def room(self, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """An uninitialised contiguous CPU tensor of ``like``'s type."""
        size = math.prod(shape)
        return self.numbers(name, size, like)[:size].view(shape)

    def numbers(self, name: str, size: int, like: Tensor) -> Tensor:
        """At least ``size`` numbers in a row, for code that takes an address: views cost as much as
        small operations do."""
        buffer = self._kept.get((name, like.dtype))
        if buffer is None or buffer.numel() < size:
            # an inference tensor kept from a warm-up would break a later training step
            with torch.inference_mode(False):
                buffer = torch.empty(size, dtype=like.dtype)
            if size * like.element_size() <= LARGEST_KEPT:
                self._kept[name, like.dtype] = buffer
        return buffer

    def room_for(self, name: str, size: int) -> Tensor:
        """The same for float32."""
        return self.numbers(name, size, _FLOAT32)

    def clear(self) -> None:
        """Give this thread's buffers back."""
        self._kept.clear()


SCRATCH = Scratch()
