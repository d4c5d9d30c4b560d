"""A call that runs, known by its frame, which is not kept alive."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from weakref import ref


class _Mark:
    """Lives as long as the frame that holds it."""


class OpenCall:
    """The call that a frame runs.

    An interrupt (Control-C, or whatever is no `Exception`) unwinds a forward pass without calling
    its forward hooks. A mark among the frame's locals tells: it dies with the frame.
    """

    def __init__(self, frame: FrameType, key: int, ended: Callable[[], None]) -> None:
        """Watch a frame.

        Args:
            frame: The frame of the call.
            key: Tells marks in one frame apart.
            ended: Called when the frame is gone, unless this object went before.
        """
        mark = _Mark()
        frame.f_locals[f"__sparsiattn_{key}__"] = mark
        self._number = id(frame)
        self._mark = ref(mark, lambda _: ended())

    @property
    def exists(self) -> bool:
        """Whether the frame exists: of another thread's call, nothing else can be known."""
        return self._mark() is not None

    def is_of(self, frame: FrameType) -> bool:
        """Whether the call runs in that frame, of this thread's present stack."""
        # while the mark lives, no other frame has its number
        return id(frame) == self._number and self.exists

    def runs(self) -> bool:
        """Whether the frame is on this thread's stack: a traceback may keep one that is not."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and not self.is_of(frame):
            frame = frame.f_back
        return frame is not None
