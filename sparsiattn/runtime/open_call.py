"""A running call, identified by its frame without keeping the frame alive."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from weakref import ref


class _Mark:
    """An object among a frame's locals, which lives as long as the frame."""


class OpenCall:
    """The call that runs in a frame.

    An interrupt (Control-C, or another exception that is not an `Exception`) unwinds a forward pass
    without calling its forward hooks. A mark among the frame's locals shows that: it dies with the
    frame.

    Attributes:
        number: ``id`` of the frame, which is unique while this call `exists`.
    """

    def __init__(self, frame: FrameType, key: int, ended: Callable[[], None]) -> None:
        """Watch a frame.

        Args:
            frame: The frame of the call.
            key: Distinguishes marks in one frame.
            ended: Called when the frame is gone, unless this object was deleted earlier.
        """
        mark = _Mark()
        frame.f_locals[f"__sparsiattn_{key}__"] = mark
        self.number = id(frame)
        self._mark = ref(mark, lambda _: ended())

    @property
    def exists(self) -> bool:
        """Whether the frame exists; nothing more can be known of a call in another thread."""
        return self._mark() is not None

    def is_of(self, frame: FrameType) -> bool:
        """Whether the call runs in that frame of this thread's current stack."""
        # while the mark is alive, no other frame has this id
        return id(frame) == self.number and self.exists

    def runs(self) -> bool:
        """Whether the frame is on this thread's stack; a traceback keeps frames that are not."""
        return _is_on_stack(self)


class NestedCall:
    """A call inside an `OpenCall`, identified only by the ``id`` of its frame.

    Setting a mark in every frame would take as long as the rest of a hook.

    Attributes:
        number: As in `OpenCall`.
    """

    __slots__ = ("_outer", "number")

    def __init__(self, frame: FrameType, outer: OpenCall) -> None:
        """Note a frame that ends before the outer call does."""
        self.number, self._outer = id(frame), outer

    @property
    def exists(self) -> bool:
        """Whether the frame may exist; it does not outlive the outer call's frame."""
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
