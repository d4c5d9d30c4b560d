"""Who reads the sequence that blocks hand on: one dense dry run follows it to its end.

What a block returns goes to the next block, and elsewhere: to a head, to a list of hidden states,
to the caller. `Consumers` says for every block whether all of that means the same for fewer tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sparsiattn.patching.discovery.meta_cache import recalling
from sparsiattn.patching.discovery.meta_model import MetaInputs, run_dry
from sparsiattn.patching.discovery.token_axis import (
    Operation,
    Outcome,
    ReadsPositions,
    TokenAxis,
    arguments,
    follow,
)
from sparsiattn.patching.discovery.token_rows import check_rows
from sparsiattn.runtime.hook_tools import first_argument, first_tensor


@dataclass(frozen=True)
class BlockRun:
    """One run of a block.

    Attributes:
        block: Number of the block.
        before: Number of the run whose output it takes; None where a sequence starts.
        handed: Whether it takes the very tensor that the run before returned.
    """

    block: int
    before: int | None
    handed: bool = True


@dataclass
class Consumers:
    """What a dense dry run says of a model's sequence.

    Attributes:
        runs: Every run of a block, in order.
        positions: By number of the block, the first thing that needs each token at its own place.
        pooled: By number of the block, the ways in which its tokens were read to their end.
    """

    runs: list[BlockRun] = field(default_factory=list)
    positions: dict[int, str] = field(default_factory=dict)
    pooled: dict[int, set[str]] = field(default_factory=dict)

    def need_all(self, block: int, uneven: bool) -> bool:
        """Whether the block's output must have its original positions.

        Args:
            block: Its number.
            uneven: Whether tokens may stand for several patches, or images have different numbers
                of them, so that only leading tokens read alike.
        """
        more_than_prefix = self.pooled.get(block, set()) - {"prefix"}
        return block in self.positions or (uneven and bool(more_than_prefix))


def find_consumers(
    model: nn.Module,
    blocks: Sequence[str],
    lead: Sequence[int],
    inputs: MetaInputs,
    *,
    several: Sequence[bool] | None = None,
) -> Consumers:
    """Who reads what the blocks of a model return.

    Args:
        model: A `meta_copy`.
        blocks: Names of its blocks, each with one sequence ``[B, N, C]``.
        lead: Of each, how many leading tokens always stay.
        inputs: What to call it with.
        several: Of each, whether a batch holds several sequences of an image; none by default.
    """
    trace = _Trace(model, blocks, lead, several or [False] * len(blocks))
    with recalling(), trace.recording():
        output = run_dry(model, inputs, trace.clear)
    trace.leave_model(output)
    return trace.consumers


class _Trace(TorchDispatchMode):
    """Follows every tensor with tokens outside of blocks."""

    def __init__(
        self, model: nn.Module, blocks: Sequence[str], lead: Sequence[int], several: Sequence[bool]
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.model, self.blocks, self.lead, self.several = model, blocks, lead, several
        self.clear()

    def clear(self) -> None:
        """Forget a run that failed."""
        self.consumers = Consumers()
        # with the tensors themselves, so that no other gets the same id
        self.axes: dict[int, tuple[Tensor, TokenAxis]] = {}
        self.returned: dict[int, int] = {}
        self.inside: list[int] = []
        self.entered: Tensor | None = None

    def axis_of(self, value: Any) -> TokenAxis | None:
        """The axis of tokens of a tensor."""
        known = self.axes.get(id(value))
        return None if known is None else known[1]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        named = arguments(func, args, kwargs or {})
        leaves = tree_leaves(list(named.values()))
        axes = [(x, axis) for x in leaves if (axis := self.axis_of(x)) is not None]
        if self.inside:
            others = [axis for x, axis in axes if x is not self.entered]
            self.refuse(others, "a block that takes it beside its own input")
        elif axes:
            self._follow(Operation(func, named, out, self.axis_of), [axis for _, axis in axes])
        return out

    def _follow(self, operation: Operation, axes: list[TokenAxis]) -> None:
        outcome: Outcome
        try:
            outcome = follow(operation)
            check_rows(operation, outcome)
        except ReadsPositions as reason:
            self.refuse(axes, str(reason))
            # what comes of it is followed, too: it may be what the next block takes
            outcome = [replace(axes[-1], kind="positions")] * len(tree_leaves(operation.out))
        for axis in axes:
            ways = self.consumers.pooled.setdefault(self._block(axis), set())
            ways |= operation.pooled
        outcomes = outcome if isinstance(outcome, list) else [outcome]
        values = operation.out if isinstance(operation.out, (tuple, list)) else [operation.out]
        for tensor, carried in zip(values, outcomes, strict=False):
            if carried is not None:
                self.axes[id(tensor)] = tensor, carried

    def _block(self, axis: TokenAxis) -> int:
        return self.consumers.runs[axis.run].block

    def refuse(self, axes: Sequence[TokenAxis], reason: str) -> None:
        """Note that something needs every position of these."""
        for axis in axes:
            self.consumers.positions.setdefault(self._block(axis), reason)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Follow tokens inside the block."""
        with ExitStack() as hooks:
            for number, name in enumerate(self.blocks):
                block = self.model.get_submodule(name)
                enter, leave = self._enter(number), self._leave(number)
                hooks.enter_context(block.register_forward_pre_hook(enter, with_kwargs=True))
                hooks.enter_context(block.register_forward_hook(leave))
            with self:
                yield

    def _enter(self, number: int) -> Any:
        def note(module: nn.Module, args: Any, kwargs: Any) -> None:
            if not self.inside:
                self.entered = first_argument(args, kwargs)
                axis, before = self.axis_of(self.entered), None
                if axis is not None and self._carried(axis):
                    before = axis.run
                elif axis is not None:
                    self.refuse([axis], "a block that takes a part of it")
                handed = before is not None and self.returned.get(id(self.entered)) == before
                self.consumers.runs.append(BlockRun(number, before, handed))
            self.inside.append(number)

        return note

    def _carried(self, axis: TokenAxis) -> bool:
        """Whether a block takes a whole sequence, as another one returned it."""
        lead = self.lead[self._block(axis)]
        if axis.kind == "positions":  # every position is given back to what lies between
            return True
        return (axis.dim, axis.lead, axis.kind) == (1, lead, "values") and axis.alone

    def _leave(self, number: int) -> Any:
        def note(module: nn.Module, args: Any, output: Any) -> None:
            self.inside.pop()
            out = first_tensor(output)
            if not self.inside and out is not None and out.dim() == 3:
                run = len(self.consumers.runs) - 1
                rows = out.shape[0] if self.several[number] else 1
                axis = TokenAxis(1, out.shape[1], self.lead[number], run, rows=rows)
                self.axes[id(out)] = out, axis
                self.returned[id(out)] = run

        return note

    def leave_model(self, output: Any) -> None:
        """Note what the caller gets, and what the model keeps as attributes."""
        for value in _leaves(output):
            if (axis := self.axis_of(value)) is not None:
                self.refuse([axis], "the caller of the model")
        for module in self.model.modules():
            for value in _leaves([v for n, v in vars(module).items() if n not in _OWN]):
                if (axis := self.axis_of(value)) is not None:
                    self.refuse([axis], f"an attribute of {type(module).__name__}")


_OWN = frozenset(vars(nn.Module()))
"""Attributes that every module has."""


def _leaves(value: Any, depth: int = 4) -> Iterator[Any]:
    """Tensors in an output, also in objects that torch does not look into."""
    for leaf in tree_leaves(value):
        if isinstance(leaf, Tensor):
            yield leaf
        elif depth and not isinstance(leaf, (nn.Module, type)) and hasattr(leaf, "__dict__"):
            yield from _leaves(vars(leaf), depth - 1)
