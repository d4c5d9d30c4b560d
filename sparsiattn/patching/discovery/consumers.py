"""Finds the consumers of the sequence that blocks pass on, in one dense dry run.

The output of a block goes to the next block, but also to a head, to a list of hidden states or to
the caller. `Consumers` says for every block whether all of them work with fewer tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from sparsiattn.patching.discovery.meta_cache import Recalled
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
from sparsiattn.runtime.hook_tools import first_argument, first_tensor, tensors_in


@dataclass(frozen=True)
class BlockRun:
    """One run of a block.

    Attributes:
        block: Index of the block.
        before: Index of the run whose output it takes; None where a sequence starts.
        handed: Whether it takes exactly the tensor that the previous run returned.
    """

    block: int
    before: int | None
    handed: bool = True


@dataclass
class Consumers:
    """The consumers of a model's sequence, from a dense dry run.

    Attributes:
        runs: Every run of a block, in order.
        positions: By block index, the first consumer that needs each token at its own position.
        pooled: By block index, the ways in which its tokens were reduced to fewer values.
    """

    runs: list[BlockRun] = field(default_factory=list)
    positions: dict[int, str] = field(default_factory=dict)
    pooled: dict[int, set[str]] = field(default_factory=dict)

    def need_all(self, block: int, uneven: bool) -> bool:
        """Whether the block's output must have all original positions.

        Args:
            block: Index of the block.
            uneven: Whether tokens may stand for several patches, or their number may differ between
                images, so that consumers of anything but prefix tokens would be wrong.
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
    """Find the consumers of the outputs of a model's blocks.

    Args:
        model: A `meta_copy`.
        blocks: Names of its blocks, each with one sequence ``[B, N, C]``.
        lead: For each block, how many leading tokens are always kept.
        inputs: The inputs of the copy.
        several: For each block, whether a batch holds several sequences per image; False by
            default.
    """
    trace = _Trace(model, blocks, lead, several or [False] * len(blocks))
    with trace.recording():
        output = run_dry(model, inputs, trace.clear)
    trace.leave_model(output)
    return trace.consumers


class _Trace(Recalled):
    """Follows every tensor with tokens outside of blocks; also recalls cached results."""

    def __init__(
        self, model: nn.Module, blocks: Sequence[str], lead: Sequence[int], several: Sequence[bool]
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.model, self.blocks, self.lead, self.several = model, blocks, lead, several
        self.clear()

    def clear(self) -> None:
        """Discard a run that failed."""
        self.consumers = Consumers()
        # keeps the tensors alive, so that no other tensor gets the same id
        self.axes: dict[int, tuple[Tensor, TokenAxis]] = {}
        self.returned: dict[int, int] = {}
        self.inside: list[int] = []
        self.entered: Tensor | None = None

    def axis_of(self, value: Any) -> TokenAxis | None:
        """The token axis of a tensor; None if it has none."""
        known = self.axes.get(id(value))
        return None if known is None else known[1]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = self.answer(func, args, kwargs)
        axes = [(x, a) for x in tensors_in((args, kwargs)) if (a := self.axis_of(x)) is not None]
        if self.inside:
            others = [axis for x, axis in axes if x is not self.entered]
            self.refuse(others, "a block that takes it in addition to its own input")
        elif axes:
            named = arguments(func, args, kwargs)
            self._follow(Operation(func, named, out, self.axis_of), [axis for _, axis in axes])
        return out

    def _follow(self, operation: Operation, axes: list[TokenAxis]) -> None:
        outcome: Outcome
        try:
            outcome = follow(operation)
            check_rows(operation, outcome)
        except ReadsPositions as reason:
            self.refuse(axes, str(reason))
            # the result is followed, too, since it may be the input of the next block
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
        """Record that a consumer needs every position of these."""
        for axis in axes:
            self.consumers.positions.setdefault(self._block(axis), reason)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Context manager: follow tokens in everything that runs inside."""
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
        """Whether a block takes a complete sequence, as another one returned it."""
        lead = self.lead[self._block(axis)]
        if axis.kind == "positions":  # all positions are restored for the code in between
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
        """Record the caller, and attributes of modules, as consumers."""
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
    """Tensors in an output, also inside objects that torch's pytree does not know."""
    for leaf in tree_leaves(value):
        if isinstance(leaf, Tensor):
            yield leaf
        elif depth and not isinstance(leaf, (nn.Module, type)) and hasattr(leaf, "__dict__"):
            yield from _leaves(vars(leaf), depth - 1)
