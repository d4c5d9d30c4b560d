"""Finds the transformer blocks of a model in a dry run, and where their sequence can be shortened.

Most blocks end in ``y = x + f(x)``, the MLP branch. The dry run finds which child takes this ``x``
and which one returns this ``f(x)``; hooks on the two then shorten the sequence between attention
and MLP without copying the block's forward. See `sparsiattn.patching.discovery.tails` for the
conditions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from sparsiattn.attention.block import Block, Tail
from sparsiattn.errors import ProbeFailed
from sparsiattn.patching.discovery.meta_model import MetaInputs, run_dry
from sparsiattn.patching.discovery.side_tables import adds_heads
from sparsiattn.patching.discovery.tails import find_tail
from sparsiattn.patching.discovery.values import OperatorTrace, Step, address
from sparsiattn.runtime.hook_tools import first_argument, first_tensor, tensors_in

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def find_blocks(model: nn.Module, sites: Iterable[str], inputs: MetaInputs) -> list[Block]:
    """The blocks of a model, in the order they run.

    Args:
        model: A `meta_copy`.
        sites: Names of its attention modules.
        inputs: The inputs of the copy.
    """
    names = list(sites)
    trace = _traced(model, names, inputs)
    homes: dict[str, list[str]] = {}
    for name in names:
        home = _home(model, name, trace.spans)
        if home is not None:
            homes.setdefault(home, []).append(name)
    blocks = [replace(trace.spans[home], sites=tuple(inner)) for home, inner in homes.items()]
    blocks.sort(key=lambda block: trace.order.index(block.name))
    return [
        replace(block, after=i == 0 or trace.follows(blocks[i - 1].name, block.name))
        for i, block in enumerate(blocks)
    ]


def in_training(model: nn.Module, blocks: list[Block], inputs: MetaInputs) -> list[Block]:
    """The blocks, with the differences of their tails in training mode.

    Functions that training applies after a branch (stochastic depth, dropout, a subset of the
    batch) are not outputs of modules, so only a second dry run finds them.

    Args:
        model: The `meta_copy` in which they were found, in eval mode; it is in eval mode
            afterwards, too.
        blocks: The blocks.
        inputs: The inputs that `find_blocks` got.
    """
    sites = [site for block in blocks for site in block.sites]
    spans = _spans_in_training(model, blocks, sites, inputs)
    return [replace(block, tail=_in_both(block.tail, spans.get(block.name))) for block in blocks]


def _in_both(tail: Tail | None, trained: Block | None) -> Tail | None:
    """The tail with a description of what is different in training mode."""
    if tail is None:
        return None
    other = None if trained is None else trained.tail
    if other is None or tail.ends != other.ends:
        why = "it adds more than the MLP branch" if trained else "it cannot run without data"
        return replace(tail, eval_only=why)
    if other.mixes and not tail.mixes:
        return replace(tail, eval_only=f"its MLP mixes tokens ({other.mixes})")
    return tail


def _spans_in_training(
    model: nn.Module, blocks: list[Block], sites: list[str], inputs: MetaInputs
) -> dict[str, Block]:
    """The blocks as found in training mode; empty if the model cannot run in it."""
    # two images, since half of a batch of one may be the whole batch
    two = tree_map(_twice, inputs)
    inside: list[nn.Module] = [model.get_submodule(block.name) for block in blocks]
    # the whole model in training mode may need labels or drop tokens; its blocks do not
    for parts, arguments in (([model], two), ([model], inputs), (inside, two), (inside, inputs)):
        try:
            for part in parts:
                part.train()
            return _traced(model, sites, arguments).spans
        except ProbeFailed:
            continue
        finally:
            model.eval()
    return {}


def _twice(value: Any) -> Any:
    of_one_image = isinstance(value, Tensor) and value.dim() > 1 and value.shape[0] == 1
    return torch.cat([value, value]) if of_one_image else value


def _traced(model: nn.Module, sites: list[str], inputs: MetaInputs) -> _Trace:
    trace = _Trace(model, sites)
    with trace.recording():
        run_dry(model, inputs, trace.clear)
    return trace


def _home(model: nn.Module, site: str, spans: dict[str, Block]) -> str | None:
    """Name of the block that contains a site.

    It is the innermost module around it that ends in a residual branch, else the outermost one that
    is an element of a container and keeps the shape of its input.
    """
    above = list(_ancestors(site))
    for name in above:
        if name in spans and spans[name].tail is not None:
            return name
    for name in [*reversed(above), site]:
        listed = isinstance(model.get_submodule(name.rpartition(".")[0]), _CONTAINERS)
        span = spans.get(name)
        keeps_shape = span is not None and span.input_shape == span.output_shape
        if listed and keeps_shape and type(model.get_submodule(name)) not in _CONTAINERS:
            return name
    return None


def _ancestors(name: str) -> Iterator[str]:
    """Paths of the modules around ``name``, innermost first, without the root."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


class _Trace(OperatorTrace):
    """Records what happens in every module around a site.

    Attributes:
        spans: Description of each of these modules as a block.
        order: Their names, in the order in which they were first entered.
    """

    def __init__(self, model: nn.Module, sites: list[str]) -> None:
        self.model, self.sites = model, frozenset(sites)
        self.watched = {home for site in sites for home in (site, *_ancestors(site))}
        super().__init__()

    def clear(self) -> None:
        super().clear()
        self.spans: dict[str, Block] = {}
        self.order: list[str] = []
        self._ends: dict[str, tuple[int, int]] = {}
        self._entries: dict[str, int] = {}
        self._taken: list[tuple[Tensor, Tensor] | None] = []

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Context manager: record everything that runs inside."""
        with ExitStack() as hooks:
            for name, module in list(self.model.named_modules())[1:]:  # all but the model itself
                enter, leave = self._enter(name), self._leave(name)
                hooks.enter_context(module.register_forward_pre_hook(enter, with_kwargs=True))
                hooks.enter_context(module.register_forward_hook(leave, with_kwargs=True))
            with self:
                yield

    def follows(self, before: str, name: str) -> bool:
        """Whether ``name`` takes the output of ``before``."""
        return self.values.same(self._ends[before][1], self._ends[name][0])

    def _enter(self, name: str) -> Any:
        def note(module: nn.Module, args: Any, kwargs: Any) -> Any:
            self.running.append(name)
            if name in self.watched and name not in self.order:
                self.order.append(name)
            self._entries[name] = len(self.steps)
            x = first_argument(args, kwargs)
            self._taken.append(None)
            if x is None:
                self.steps.append(Step("enter", name, (), ()))
                return None
            values = self._numbers(x, (args, kwargs))
            plain = bool(args) and args[0] is x
            taken = x
            if plain and name not in self.watched and type(x) is Tensor:
                taken = self.copy_of(x)
                self._taken[-1] = (taken, x)
            results = (self.values.number(taken),)
            self.steps.append(Step("enter", name, values, results, plain=plain))
            return None if taken is x else ((taken, *args[1:]), kwargs)

        return note

    def _leave(self, name: str) -> Any:
        def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            self._wrote_to_input(self._taken.pop())
            self.running.pop()
            out, x = first_tensor(output), first_argument(args, kwargs)
            results = () if out is None else self._numbers(out, output)
            plain = isinstance(output, Tensor)
            left = Step("leave", name, (), results, plain=plain)
            if out is not None and x is not None and name in self.watched:
                self._note_block(left, x.shape, out.shape)
            self.steps.append(left)

        return note

    def _wrote_to_input(self, taken: tuple[Tensor, Tensor] | None) -> None:
        """Record a write to the copy of a module's input as a write to the input itself."""
        if taken is None or not self.values.writes.get(address(taken[0])):
            return
        written = frozenset({address(taken[1])})
        values = (self.values.number(taken[0]),)
        self.values.wrote(written)
        self.steps.append(Step("op", self.running[-1], values, (), written=written))

    def _numbers(self, first: Tensor, others: Any) -> tuple[int, ...]:
        rest = (x for x in tensors_in(others) if x is not first)
        return tuple(self.values.number(x) for x in (first, *rest))

    def _note_block(self, left: Step, taken: torch.Size, returned: torch.Size) -> None:
        steps = self._since_entry(left.name)
        x = steps[0].values[0]
        block = self.model.get_submodule(left.name)
        weights = {id(weight): name for name, weight in block.named_parameters(recurse=False)}
        tail = find_tail(steps, left, self.values, self.sites, weights)
        inside = (step for step in steps[1:] if step.kind == "enter" and x in step.values[:1])
        head = next((step.name for step in inside), None)
        self.spans[left.name] = Block(
            left.name, taken, returned, (), tail, head, adds_heads=adds_heads(steps)
        )
        self._ends[left.name] = x, left.results[0]

    def _since_entry(self, name: str) -> list[Step]:
        """The steps since this module was entered."""
        return self.steps[self._entries[name] :]
