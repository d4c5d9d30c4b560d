"""What blocks of user code set for patches, as ``with patch.disabled():`` does.

It belongs to a context (`contextvars`): to a thread, or a task of an event loop. Generators have no
context of their own, so a block inside one counts only while the generator runs.

Read the settings as attributes of this module: ``disabled`` (keys of patches), ``observer`` (key of
a patch and a function), ``warming`` (key of the patch whose kernels get ready), ``meter`` (see
`sparsiattn.runtime.metering`) and ``watched`` (a `sparsiattn.runtime.monitor.WatchedPass`). Dynamo
cannot read a context variable. It does read attributes of modules, and its guards ask for them
again before each call, so compiled code follows the context as well.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from dis import opmap
from types import FrameType
from typing import Any

import torch

disabled: tuple[int, ...]
observer: tuple[int, Any] | None
warming: int | None
meter: Any
watched: Any

_ONE = ("observer", "warming", "meter", "watched")
_SUSPENDABLE = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR
_EVENT_LOOPS = ("asyncio", "trio", "curio", "uvloop")
_BLOCKS_OF_OTHERS = ("contextlib", "_pytest", "pytest_asyncio")
"""Packages that run a generator as a block: what it sets is for the code inside that block."""


@dataclass(eq=False)
class _Setting:
    """What one block sets.

    Attributes:
        slot: Name of the setting.
        value: Its value.
        frame: The generator that the block stands in; None in plain code and in tasks.
        ended: Whether the block was left.
    """

    slot: str
    value: Any
    frame: FrameType | None
    ended: bool = False

    def counts(self) -> bool:
        """Whether the code that runs now is inside the block."""
        return not self.ended and (self.frame is None or not _is_suspended(self.frame))


_SETTINGS: ContextVar[tuple[_Setting, ...]] = ContextVar("sparsiattn_settings", default=())


def are_set() -> bool:
    """Whether there may be any; a traced program has to look at each."""
    return torch.compiler.is_compiling() or bool(_SETTINGS.get())


def __getattr__(name: str) -> Any:
    if name == "disabled":
        return _values(name)
    if name in _ONE:
        values = _values(name)
        return values[-1] if values else None
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _values(slot: str) -> tuple[Any, ...]:
    return tuple(s.value for s in _SETTINGS.get() if s.slot == slot and s.counts())


@contextmanager
def setting(slot: str, value: Any) -> Iterator[None]:
    """A setting for the code inside the block; blocks may end in any order.

    Args:
        slot: Name of the setting.
        value: Its value.
    """
    entry = begin(slot, value, _generator_around(sys._getframe(1)))
    try:
        yield
    finally:
        end(entry)


def begin(slot: str, value: Any, frame: FrameType | None = None) -> _Setting:
    """A setting that holds until `end`: for hooks, which are no block.

    Args:
        slot: Name of the setting.
        value: Its value.
        frame: The generator that all of it stands in, if its reader may go on before it ends.
    """
    entry = _Setting(slot, value, frame)
    _SETTINGS.set((*(s for s in _SETTINGS.get() if not s.ended), entry))
    return entry


def end(entry: _Setting) -> None:
    """Undo `begin`; twice is no error."""
    settings = _SETTINGS.get()
    if entry in settings:
        _SETTINGS.set(tuple(s for s in settings if s is not entry))
    if entry.frame is not None or entry not in settings:
        # copies of a context keep what a block around them set; a generator's block is over
        # everywhere, and so is one that was left in another context than it was entered in
        entry.ended = True
    entry.frame = None


def _generator_around(frame: FrameType | None) -> FrameType | None:
    """The innermost generator that runs this code, if its reader may go on before it ends."""
    while frame is not None:
        suspendable = frame.f_code.co_flags & _SUSPENDABLE
        if suspendable and not _runs_as_block(frame) and not _belongs_to_task(frame):
            return frame
        frame = frame.f_back
    return None


def _package(frame: FrameType | None) -> str:
    name = "" if frame is None else frame.f_globals.get("__name__") or ""
    return str(name).partition(".")[0]


def _runs_as_block(frame: FrameType) -> bool:
    return any(_package(f) in _BLOCKS_OF_OTHERS for f in (frame, frame.f_back))


def _belongs_to_task(frame: FrameType) -> bool:
    """Whether an event loop runs this coroutine, in a context of its task."""
    if not frame.f_code.co_flags & inspect.CO_COROUTINE:
        return False
    caller: FrameType | None = frame
    while caller is not None and caller.f_code.co_flags & _SUSPENDABLE:
        caller = caller.f_back
    return _package(caller) in _EVENT_LOOPS


_YIELD, _RESUME, _YIELD_FROM = (
    opmap.get(name, -1) for name in ("YIELD_VALUE", "RESUME", "YIELD_FROM")
)
_AFTER_AWAIT = 3
"""Argument of RESUME behind an ``await``; Python 3.10 has no such instruction."""


def _is_suspended(frame: FrameType) -> bool:
    """Whether a generator has yielded, so that its reader runs.

    While an asynchronous generator waits, what it waits for runs, which is no reader.
    """
    code, at = frame.f_code.co_code, frame.f_lasti
    here, after = code[at], code[at + 2] if at + 2 < len(code) else -1
    waits = frame.f_code.co_flags & inspect.CO_ASYNC_GENERATOR
    if here == _YIELD:
        return not (waits and after == _RESUME and code[at + 3] & 3 == _AFTER_AWAIT)
    if here == _RESUME and code[at + 1] & 3:  # Python 3.13 points behind the yield
        return not (waits and code[at + 1] & 3 == _AFTER_AWAIT)
    return after == _YIELD_FROM and not waits
