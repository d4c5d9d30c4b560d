"""Records a dry run step by step, with a number for every value.

Tensors can be written to: ``y = x + f; y.mul_(2)`` returns the tensor that the addition made, but
with another value. Therefore values get numbers: a write to a tensor, or to any view of its memory,
makes new ones, and views of the same elements share one.
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
    """One recorded step.

    Attributes:
        kind: A module was entered (``"enter"``) or left (``"leave"``), or an operator ran
            (``"op"``).
        name: Path of the module, or of the innermost module around the operator.
        values: Numbers of the inputs before the step; for a module, its first tensor comes first.
        results: Numbers of the results; for a module that was entered, of the input that the trace
            passed instead of the original one.
        call: The operator, its arguments, keyword arguments and result; None for modules.
        written: Addresses of the memory that it wrote to.
        plain: For a module that was entered, whether its first tensor was its first positional
            argument; for one that was left, whether it returned just a tensor.
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
    """Numbers of values. Tensors are kept alive, so that no address is used twice.

    Attributes:
        memory: By number of a value, the address of its memory.
        writes: How often each memory was written to.
        origins: By number of a copy, the number of the value that it copies.
    """

    memory: dict[int, int] = field(default_factory=dict)
    writes: dict[int, int] = field(default_factory=dict)
    origins: dict[int, int] = field(default_factory=dict)
    _numbers: dict[Any, int] = field(default_factory=dict)
    _kept: list[Tensor] = field(default_factory=list)

    def number(self, x: Tensor) -> int:
        """The number of the tensor's current value."""
        memory = address(x)
        shape, strides = x.shape, x.stride()
        if 1 in shape:  # the stride of an axis of size 1 has no meaning
            strides = tuple(0 if n == 1 else s for n, s in zip(shape, strides, strict=True))
        key = (memory, self.writes.get(memory, 0), x.storage_offset(), shape, strides, x.dtype)
        number = self._numbers.get(key)
        if number is None:
            self._kept.append(x)
            number = self._numbers[key] = len(self._numbers)
            self.memory[number] = memory
        return number

    def wrote(self, memory: Iterable[int]) -> None:
        """Record that the values in this memory have changed."""
        for place in memory:
            self.writes[place] = self.writes.get(place, 0) + 1

    def lineage(self, number: int) -> list[int]:
        """This value and the values that it is a copy of, latest first."""
        line = [number]
        while line[-1] in self.origins:
            line.append(self.origins[line[-1]])
        return line

    def same(self, a: int, b: int) -> bool:
        """Whether two values are the same or copies of the same value."""
        return self.lineage(a)[-1] == self.lineage(b)[-1]


class OperatorTrace(Recalled):
    """Records every operator as a `Step`; also recalls cached results.

    Attributes:
        steps: The steps so far.
        values: Numbers of the values in them.
        running: Paths of the running modules, innermost last.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.clear()

    def clear(self) -> None:
        """Discard a run that failed."""
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
        """A copy with its own number, so that its uses can be distinguished from those of ``x``."""
        self._paused = True
        try:
            copied = x.clone()
        finally:
            self._paused = False
        self.values.origins[self.values.number(copied)] = self.values.number(x)
        return copied


def address(x: Tensor) -> int:
    """Address of the tensor's memory, which views share."""
    return int(x.untyped_storage()._cdata)


def _is_copy(func: Any, args: Any, out: Any) -> bool:
    """Whether an operator returns its input, possibly in other memory."""
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
