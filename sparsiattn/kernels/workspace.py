"""Buffers that kernels reuse from call to call, one set per thread.

Large temporaries return to the operating system when they are freed, and allocating them again
costs a page fault for every 4 KiB: more than the arithmetic on them at a thousand tokens.
"""

from __future__ import annotations

import math
import threading

import torch
from torch import Tensor

# Larger buffers are not kept; in bytes per name.
LARGEST_KEPT = 1 << 25


_FLOAT32 = torch.empty(0)


class Scratch(threading.local):
    """Named buffers.

    The next request for the same name in the same thread overwrites a buffer, so no tensor that
    autograd saves, and none that is returned to the host, may use one.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[str, torch.dtype], Tensor] = {}

    def room(self, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """An uninitialised contiguous CPU tensor with the dtype of ``like``."""
        size = math.prod(shape)
        return self.numbers(name, size, like)[:size].view(shape)

    def numbers(self, name: str, size: int, like: Tensor) -> Tensor:
        """A buffer of at least ``size`` numbers, for code that takes an address.

        It is not cut to size, because a view costs as much as a small operation.
        """
        buffer = self._kept.get((name, like.dtype))
        if buffer is None or buffer.numel() < size:
            # an inference tensor from a warm-up would break a later training step
            with torch.inference_mode(False):
                buffer = torch.empty(size, dtype=like.dtype)
            if size * like.element_size() <= LARGEST_KEPT:
                self._kept[name, like.dtype] = buffer
        return buffer

    def room_for(self, name: str, size: int) -> Tensor:
        """`numbers` for float32."""
        return self.numbers(name, size, _FLOAT32)

    def clear(self) -> None:
        """Free this thread's buffers."""
        self._kept.clear()


SCRATCH = Scratch()
