"""What a dry run computes, step by step, with a number for every value.

A tensor is a place, and code may write to it: ``y = x + f; y.mul_(2)`` returns the very tensor that
the addition made, and yet another value. So values get numbers: a write to a tensor, or to any view
of its memory, makes new ones, and views that show the same elements share one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

from sparsiattn.patching.discovery.meta_cache import Recalled
from sparsiattn.runtime.hook_tools import tensors_in

_ATEN = torch.ops.aten
_COPIES = (_ATEN.clone.default, _ATEN._to_copy.default)


@dataclass(frozen=True)
class Step:
    """One thing that happened.

    Attributes:
        kind: A module was entered (``"enter"``) or left (``"leave"``), or an operator ran
            (``"op"``).
        name: Path of the module, or of the innermost one around the operator.
        values: Numbers of what it took (the first tensor of a module), as it was before.
        results: Numbers of what it returned; of a module that was entered, of the input that the
            trace handed it instead of its own.
        call: The operator with its arguments.
        written: Addresses of the memory that it wrote to.
        plain: Whether a module's first tensor was its first positional argument, or all that it
            returned.
    """

    kind: str
    name: str
    values: tuple[int, ...]
    results: tuple[int, ...]
    call: tuple[Any, Any, Any, Any] | None = None
    written: frozenset[int] = frozenset()
    plain: bool = True


@dataclass
class Values:
    """Numbers of values; tensors seen are kept, so that no address is used twice.

    Attributes:
        memory: Address of the memory that holds a value, by its number.
        writes: How often each memory was written to.
        origins: Of what value another is a mere copy.
    """

    memory: dict[int, int] = field(default_factory=dict)
    writes: dict[int, int] = field(default_factory=dict)
    origins: dict[int, int] = field(default_factory=dict)
    _numbers: dict[Any, int] = field(default_factory=dict)
    _kept: list[Tensor] = field(default_factory=list)

    def number(self, x: Tensor) -> int:
        """The number of what the tensor holds now."""
        memory = address(x)
        # the stride of an axis of one element says nothing
        strides = tuple(0 if n == 1 else s for n, s in zip(x.shape, x.stride(), strict=True))
        key = (memory, self.writes.get(memory, 0), x.storage_offset(), x.shape, strides, x.dtype)
        if key not in self._numbers:
            self._kept.append(x)
            self._numbers[key] = len(self._numbers)
            self.memory[self._numbers[key]] = memory
        return self._numbers[key]

    def wrote(self, memory: Iterable[int]) -> None:
        """Whatever lies there has changed."""
        for place in memory:
            self.writes[place] = self.writes.get(place, 0) + 1

    def lineage(self, number: int) -> list[int]:
        """This value and those that it is a mere copy of, the latest first."""
        line = [number]
        while line[-1] in self.origins:
            line.append(self.origins[line[-1]])
        return line

    def same(self, a: int, b: int) -> bool:
        """Whether two values are one, but for copies."""
        return self.lineage(a)[-1] == self.lineage(b)[-1]


class OperatorTrace(Recalled):
    """Notes every operator as a `Step`; it recalls results as well.

    Attributes:
        steps: What happened so far.
        values: Numbers of the values in them.
        running: Paths of the modules that run, the innermost last.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.clear()

    def clear(self) -> None:
        """Forget a run that failed on the way."""
        self.steps: list[Step] = []
        self.values = Values()
        self.running: list[str] = []
        self._paused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._paused:
            return self.answer(func, args, kwargs)
        values = tuple(self.values.number(x) for x in tensors_in((args, kwargs)))
        out = self.answer(func, args, kwargs)
        written = frozenset(_written(func, args, kwargs))
        self.values.wrote(written)
        results = tuple(self.values.number(x) for x in tensors_in(out))
        if _is_copy(func, args, out) and results[0] not in values:
            self.values.origins[results[0]] = values[0]
        name = self.running[-1] if self.running else ""
        self.steps.append(Step("op", name, values, results, (func, args, kwargs, out), written))
        return out

    def copy_of(self, x: Tensor) -> Tensor:
        """A copy with a number of its own, so that its uses are told from those of ``x``."""
        self._paused = True
        try:
            copied = x.clone()
        finally:
            self._paused = False
        self.values.origins[self.values.number(copied)] = self.values.number(x)
        return copied


def address(x: Tensor) -> int:
    """Where the tensor's memory is; views share it."""
    return int(x.untyped_storage()._cdata)


def _is_copy(func: Any, args: Any, out: Any) -> bool:
    """Whether an operator returns what it took, in other memory perhaps."""
    return func in _COPIES and out.dtype == args[0].dtype


def _written(func: Any, args: Any, kwargs: Any) -> Iterable[int]:
    """Addresses of the memory that an operator writes to, by its schema."""
    for i, name in _targets(func):
        value = kwargs.get(name, args[i] if i < len(args) else None)
        yield from (address(x) for x in tensors_in(value))


@cache
def _targets(func: Any) -> list[tuple[int, str]]:
    """Arguments that an operator writes to, by position and name."""
    arguments = enumerate(func._schema.arguments)
    return [(i, a.name) for i, a in arguments if a.alias_info is not None and a.alias_info.is_write]
