"""Settings that with blocks of user code make for patches, as ``with patch.disabled():`` does.

Settings belong to a context (`contextvars`), that is a thread or an asyncio task. Generators have
no context of their own, so a block inside a generator applies only while the generator runs.

Read the settings as attributes of this module: ``disabled`` (keys of patches), ``observer`` (key of
a patch and a function), ``warming`` (key of the patch whose kernels are being warmed up), ``meter``
(see `sparsiattn.runtime.metering`) and ``watched`` (a `sparsiattn.runtime.monitor.WatchedPass`).
Dynamo cannot read a context variable. It does read attributes of modules, and its guards read them
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
"""Packages that run a generator as a with block: its settings apply to the code in that block."""


@dataclass(eq=False)
class _Setting:
    """The setting of one block.

    Attributes:
        slot: Name of the setting.
        value: Its value.
        frame: Frame of the generator that contains the block; None in plain code and in tasks.
        ended: Whether the block has ended.
    """

    slot: str
    value: Any
    frame: FrameType | None
    ended: bool = False

    def counts(self) -> bool:
        """Whether the running code is inside the block."""
        return not self.ended and (self.frame is None or not _is_suspended(self.frame))


_SETTINGS: ContextVar[tuple[_Setting, ...]] = ContextVar("sparsiattn_settings", default=())


def are_set() -> bool:
    """Whether there may be settings; a traced program has to check each of them."""
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
    """Apply a setting inside a with block; blocks may end in any order.

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
    """Apply a setting until `end` is called; for hooks, which cannot use a with block.

    Args:
        slot: Name of the setting.
        value: Its value.
        frame: Frame of the generator that contains the block; None in plain code and in tasks.
    """
    entry = _Setting(slot, value, frame)
    _SETTINGS.set((*(s for s in _SETTINGS.get() if not s.ended), entry))
    return entry


def end(entry: _Setting) -> None:
    """Undo `begin`; calling it twice is allowed."""
    settings = _SETTINGS.get()
    if entry in settings:
        _SETTINGS.set(tuple(s for s in settings if s is not entry))
    if entry.frame is not None or entry not in settings:
        # A copied context keeps the settings of the blocks around it. A block in a generator, and
        # a block left in another context than it was entered in, end in all contexts.
        entry.ended = True
    entry.frame = None


def _generator_around(frame: FrameType | None) -> FrameType | None:
    """The innermost generator that runs this code, if its consumer can run before it ends."""
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
    """Whether an event loop runs this coroutine, in the context of its task."""
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
"""Argument of RESUME after an ``await``; Python 3.10 has no such instruction."""


def _is_suspended(frame: FrameType) -> bool:
    """Whether a generator has yielded, so that its consumer runs.

    While an asynchronous generator awaits something, the awaited code runs, not its consumer.
    """
    code, at = frame.f_code.co_code, frame.f_lasti
    instruction, after = code[at], code[at + 2] if at + 2 < len(code) else -1
    waits = frame.f_code.co_flags & inspect.CO_ASYNC_GENERATOR
    if instruction == _YIELD:
        return not (waits and after == _RESUME and code[at + 3] & 3 == _AFTER_AWAIT)
    # Python 3.13 points to the instruction after yield
    if instruction == _RESUME and code[at + 1] & 3:
        return not (waits and code[at + 1] & 3 == _AFTER_AWAIT)
    return after == _YIELD_FROM and not waits
