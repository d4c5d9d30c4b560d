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

    Attributes:
        number: That of the frame, which no other has while this call `exists`.
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
        self.number = id(frame)
        self._mark = ref(mark, lambda _: ended())

    @property
    def exists(self) -> bool:
        """Whether the frame exists: of another thread's call, nothing else can be known."""
        return self._mark() is not None

    def is_of(self, frame: FrameType) -> bool:
        """Whether the call runs in that frame, of this thread's present stack."""
        # while the mark lives, no other frame has its number
        return id(frame) == self.number and self.exists

    def runs(self) -> bool:
        """Whether the frame is on this thread's stack: a traceback may keep one that is not."""
        return _is_on_stack(self)


class NestedCall:
    """A call inside an `OpenCall`, known by the number of its frame alone.

    A mark in every frame would take as long as all else that a hook does.

    Attributes:
        number: As in `OpenCall`.
    """

    __slots__ = ("_outer", "number")

    def __init__(self, frame: FrameType, outer: OpenCall) -> None:
        """Note a frame that ends before the outer call does."""
        self.number, self._outer = id(frame), outer

    @property
    def exists(self) -> bool:
        """Whether the frame may exist: it does not outlive the outer call's."""
        return self._outer.exists

    def is_of(self, frame: FrameType) -> bool:
        """As `OpenCall.is_of`."""
        return id(frame) == self.number and self.exists

    def runs(self) -> bool:
        """As `OpenCall.runs`."""
        return _is_on_stack(self)


def _is_on_stack(call: OpenCall | NestedCall) -> bool:
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and not call.is_of(frame):
        frame = frame.f_back
    return frame is not None
