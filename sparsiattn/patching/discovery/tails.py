"""Analyses the end of a block: whether tokens can leave it between attention and MLP.

They can if the block's output is exactly the sum ``x + f(x)``, if ``f`` processes every token
independently, and if nothing else in the host uses the branch. Hooks then give ``f`` fewer tokens,
keep its result and give the host zeros to add. A per-channel parameter of the block may scale the
branch at its end (layer scale). Any other factor (``alpha``), operations on the sum, a second
branch, or other uses of the branch's values would be lost or wrong.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch

from sparsiattn.attention.block import Tail
from sparsiattn.patching.discovery.token_axes import Axes, Call, TokensMeet, axes_after
from sparsiattn.patching.discovery.values import Step, Values
from sparsiattn.runtime.hook_tools import tensors_in

_MULTIPLY = torch.ops.aten.mul.Tensor
_ADD = (torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor)
_COPIES = frozenset({"alias", "clone", "detach", "_to_copy"})
_VIEWS = frozenset({"view", "_unsafe_view", "reshape"})


class _Ends(NamedTuple):
    """Where a branch starts and ends, as indices of steps.

    Attributes:
        entry: Step that enters the branch's first module.
        last: Step that leaves its last module.
        scaled: Step that scales the result; None if none does.
        factor: Name of the parameter that scales it; None if there is none.
    """

    entry: int
    last: int
    scaled: int | None = None
    factor: str | None = None


def find_tail(
    steps: list[Step],
    left: Step,
    values: Values,
    sites: frozenset[str],
    weights: Mapping[int, str],
) -> Tail | None:
    """The end ``x + f(x)`` of a block; None if it has no such end.

    Args:
        steps: The steps in the block, its entry first.
        left: The step that leaves the block.
        values: Numbers of the values.
        sites: Names of the attention modules.
        weights: Names of the block's own parameters by their id.
    """
    attended = [i for i, s in enumerate(steps) if s.kind == "leave" and s.name in sites]
    added = _final_addition(steps, left, values)
    if not attended or added is None or added < attended[-1]:
        return None
    mixing = None
    for ends in _branches(steps, attended[-1], added, values, weights):
        branch = _Branch(steps, left, values, ends, added)
        if not branch.is_apart():
            continue
        shape = steps[added].call[1][0].shape  # type: ignore[index]
        entry, last = steps[ends.entry].name, steps[ends.last].name
        tail = Tail(entry, last, branch.mixing, shape, factor=ends.factor)
        if tail.mixes is None:
            return tail
        mixing = mixing or tail
    return mixing


def _final_addition(steps: list[Step], left: Step, values: Values) -> int | None:
    """Index of the addition whose result the block returns unchanged."""
    returned = left.results[0]
    # if the sum is written to the caller's own tensor, the caller sees it without the output
    if values.memory[returned] == values.memory[steps[0].values[0]]:
        return None
    for i in reversed(range(len(steps))):
        step = steps[i]
        if step.call is None or not step.results or not values.same(step.results[0], returned):
            continue
        func, args, kwargs, out = step.call
        if func in _ADD and len(step.values) == 2:
            plain = args[0].shape == args[1].shape and kwargs.get("alpha", 1) == 1
            return i if plain else None
        if _lays_out(func, args[0], out):
            returned = step.values[0]
    return None


def _lays_out(func: Any, x: Any, out: Any) -> bool:
    """Whether an operator is a view of the same tokens in the same order, as rows or as a grid."""
    if func._schema.name.removeprefix("aten::") not in _VIEWS:
        return False
    return bool((x.shape[0], x.shape[-1]) == (out.shape[0], out.shape[-1]))


def _branches(
    steps: list[Step], start: int, added: int, values: Values, weights: Mapping[int, str]
) -> Iterator[_Ends]:
    """Candidates: a module that takes one summand, and the last module that returns the other."""
    for x, f in (steps[added].values, steps[added].values[::-1]):
        scaled = _scaling(steps, start, added, values.lineage(f), weights)
        line, factor = values.lineage(f), None
        if scaled is not None:
            of_branch, factor = _factor(steps[scaled], weights)
            line = values.lineage(of_branch)
        returned = [
            i
            for i in range(start, added)
            if steps[i].kind == "leave" and steps[i].plain and steps[i].results[0] in line
        ]
        for i in range(start, returned[-1] if returned else start):
            step = steps[i]
            if step.kind == "enter" and step.values and values.same(step.values[0], x):
                yield _Ends(i, returned[-1], scaled, factor)


def _scaling(
    steps: list[Step], start: int, added: int, line: list[int], weights: Mapping[int, str]
) -> int | None:
    """Index of the operator that scales this value by the block's own parameter; None if none."""
    for i in reversed(range(start, added)):
        step = steps[i]
        if step.kind == "op" and step.results and step.results[0] in line:
            scales = step.name == steps[added].name and _factor(step, weights)[1] is not None
            return i if scales else None
    return None


def _factor(step: Step, weights: Mapping[int, str]) -> tuple[int, str | None]:
    """The value that an operator scales, and the name of the per-channel parameter it uses."""
    if step.call is None or step.call[0] is not _MULTIPLY:
        return step.values[0], None
    for value, x in zip(step.values[::-1], step.call[1], strict=False):
        if id(x) in weights and x.numel() == (x.shape[-1] if x.dim() else 1):
            return value, weights[id(x)]
    return step.values[0], None


class _Branch:
    """A branch ``f`` of a block that ends in ``x + f(x)``.

    Attributes:
        mixing: Path of the first module in it that does not process each token independently.
    """

    def __init__(
        self, steps: list[Step], left: Step, values: Values, ends: _Ends, added: int
    ) -> None:
        self.steps, self.left, self.values = steps, left, values
        self.entry, self.last, self.scaled, _ = ends
        self.added = added
        self.mixing: str | None = None
        # values that come from the tokens, with their token axes; no axes once tokens were mixed
        self._axes: dict[int, Axes] = {}
        self._fresh: set[int] = set()  # memory that the branch has allocated
        self._spoilt: set[int] = set()  # memory that it has written to

    def is_apart(self) -> bool:
        """Whether hooks on its first and last module affect this branch and nothing else."""
        first, last = self.steps[self.entry], self.steps[self.last]
        copied = first.plain and first.results[0] != first.values[0]
        # the hook of the last module does nothing before the branch is entered
        once = self._runs_once(first.name, 0) and self._runs_once(last.name, self.entry)
        if not copied or not once:
            return False
        if any(self.values.same(value, first.values[0]) for value in first.values[1:]):
            return False  # its other arguments would still have all tokens
        return self._follow(first, last) and self._is_unseen()

    def _runs_once(self, name: str, start: int) -> bool:
        """Whether a module is inside the block, and runs once from ``start`` to the block's end."""
        times = sum(s.kind == "leave" and s.name == name for s in self.steps[start:])
        return times == 1 and name.startswith(f"{self.left.name}.")

    def _follow(self, first: Step, last: Step) -> bool:
        """Follow the tokens through the branch; False if they also go elsewhere."""
        shape = self.steps[self.added].call[1][0].shape  # type: ignore[index]
        tokens = frozenset(d for d in range(1, len(shape) - 1) if shape[d] != 1)
        grid = tuple(shape[d] for d in sorted(tokens))
        self._axes[first.results[0]] = tokens
        for step in self.steps[self.entry + 1 : self.last]:
            if not any(map(self._comes_from_tokens, step.values)):
                continue
            if step.kind == "enter" and self._comes_from_tokens(step.values[0]):
                self._axes[step.results[0]] = self._axes.get(step.values[0], Axes())
                if self.values.memory[step.values[0]] in self._fresh:
                    self._fresh.add(self.values.memory[step.results[0]])
            elif step.kind == "op" and not self._compute(step, grid):
                return False
        axes = self._axes.get(last.results[0])
        if axes is not None and axes != tokens and self.mixing is None:
            self.mixing = last.name
        return axes is not None

    def _comes_from_tokens(self, value: int) -> bool:
        return value in self._axes or self.values.memory[value] in self._spoilt

    def _compute(self, step: Step, grid: tuple[int, ...]) -> bool:
        """Record the results of an operator of the branch; False if it writes to other memory."""
        memory = self.values.memory
        if not step.written <= self._fresh:
            return False
        self._spoilt |= step.written
        if step.call is None:
            return True
        self._fresh |= {memory[v] for v in step.results} - {memory[v] for v in step.values}
        axes: Axes | None = Axes()
        try:
            axes = self._axes_after(step, grid)
        except TokensMeet:
            self.mixing = self.mixing or step.name
        if axes is None:
            return True
        self._axes.update(dict.fromkeys(step.results, axes))
        return True

    def _axes_after(self, step: Step, grid: tuple[int, ...]) -> Axes | None:
        assert step.call is not None
        if not all(self._axes.get(value, True) for value in step.values):
            raise TokensMeet
        func, args, kwargs, out = step.call
        tensors = zip(tensors_in((args, kwargs)), step.values, strict=True)
        axes = {id(x): self._axes.get(value, Axes()) for x, value in tensors}
        return axes_after(Call(func, args, kwargs, out, axes, grid))

    def _is_unseen(self) -> bool:
        """Whether only the addition uses the branch, and nothing else changes the sum."""
        for i in range(self.last + 1, len(self.steps)):
            step = self.steps[i]
            if step.kind != "op" or not any(map(self._comes_from_tokens, step.values)):
                continue
            name = "" if step.call is None else step.call[0]._schema.name.removeprefix("aten::")
            allowed = _COPIES if i < self.added else _COPIES | _VIEWS
            if i not in (self.added, self.scaled) and name not in allowed:
                return False
            self._axes.update(dict.fromkeys(step.results, Axes()))
        return not any(map(self._comes_from_tokens, self.left.results[1:]))
