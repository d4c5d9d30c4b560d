"""Transformer blocks of a model, found by a dry run: where the sequence can be made shorter.

Most blocks end in ``y = x + f(x)``, the MLP branch. The dry run notes which child takes that ``x``
and which one returns that ``f(x)``; hooks on the two then shorten the sequence between attention
and MLP without a copied forward.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sparsiattn.attention.block import Block, Tail
from sparsiattn.patching.discovery.meta_cache import recalling
from sparsiattn.patching.discovery.meta_model import MetaInputs, run_dry
from sparsiattn.runtime.hook_tools import first_argument, first_tensor

_ADD = (torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor)
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def find_blocks(model: nn.Module, sites: Iterable[str], inputs: MetaInputs) -> list[Block]:
    """The blocks of a model, in the order they run.

    Args:
        model: A `meta_copy`.
        sites: Names of its attention modules.
        inputs: What to call it with.
    """
    names = list(sites)
    trace = _Trace(model, names)
    with recalling(), trace.recording():
        run_dry(model, inputs)
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


def _home(model: nn.Module, site: str, spans: dict[str, Block]) -> str | None:
    """Name of the block that a site is in.

    The innermost module around it that ends in a residual branch, else the outermost one that
    stands in a list of modules and keeps the shape of its input.
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
    """Paths of the modules around ``name``, innermost first, the root left out."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


class _Trace(TorchDispatchMode):
    """Notes, for every module around a site, the calls of its children and the additions."""

    def __init__(self, model: nn.Module, sites: list[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.model, self.sites = model, set(sites)
        self.watched = {home for site in sites for home in (site, *_ancestors(site))}
        self.spans: dict[str, Block] = {}
        self.order: list[str] = []
        self._events: list[tuple[str, str, Tensor, Tensor | None, Tensor | None]] = []
        self._ends: dict[str, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in _ADD and isinstance(args[1], Tensor):
            self._events.append(("add", "", out, args[0], args[1]))
        return out

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Note what happens inside the block."""
        hooks = []
        for name, module in self.model.named_modules():
            if not name:
                continue
            hooks.append(module.register_forward_pre_hook(self._enter(name), with_kwargs=True))
            hooks.append(module.register_forward_hook(self._leave(name), with_kwargs=True))
        try:
            with self:
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def follows(self, before: str, name: str) -> bool:
        """Whether ``name`` takes what ``before`` gave."""
        output, entered = self._ends[before][1], self._ends[name][0]
        return output.shape == entered.shape and _same(output, entered)

    def _enter(self, name: str) -> Any:
        def note(module: nn.Module, args: Any, kwargs: Any) -> None:
            x = first_argument(args, kwargs)
            if x is not None:
                self._events.append(("enter", name, x, None, None))
            if name in self.watched and name not in self.order:
                self.order.append(name)

        return note

    def _leave(self, name: str) -> Any:
        def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            out, x = first_tensor(output), first_argument(args, kwargs)
            if out is None or x is None:
                return
            if name in self.watched:
                events = self._inside(name)
                tail, head = self._tail(events, out), _first(events, range(len(events)), "enter", x)
                inner = None if head is None else head[1]
                self.spans[name] = Block(name, x.shape, out.shape, (), tail, inner)
                self._ends[name] = x, out
            self._events.append(("leave", name, out, None, None))

        return note

    def _inside(self, name: str) -> list[Any]:
        """What happened since this module was entered."""
        entered = [i for i, event in enumerate(self._events) if event[:2] == ("enter", name)]
        return self._events[entered[-1] + 1 :]

    def _tail(self, events: list[Any], out: Tensor) -> Tail | None:
        """How the block that just ran ends, if it ends in ``x + f(x)``."""
        attended = [i for i, e in enumerate(events) if e[0] == "leave" and e[1] in self.sites]
        adds = [i for i, e in enumerate(events) if e[0] == "add" and _same(e[2], out)]
        if not attended or not adds or adds[-1] < attended[-1]:
            return None
        # the last addition of the block, after its attention, whose result is the block's own
        start, stop = attended[-1], adds[-1]
        _, _, _, left, right = events[stop]
        for x, branch in ((left, right), (right, left)):
            if x is None or branch is None or x.shape != branch.shape:
                continue
            entry = _first(events, range(start, stop), "enter", x)
            last = _first(events, range(stop - 1, start, -1), "leave", branch)
            if entry is not None and last is not None and entry[0] < last[0]:
                return Tail(entry[1], last[1], self._mixing(events, entry[0], last[0]))
        return None

    def _mixing(self, events: list[Any], start: int, stop: int) -> str | None:
        """The first module in the branch that looks at more than one token at a time."""
        for kind, name, *_ in events[start:stop]:
            module = self.model.get_submodule(name) if kind == "enter" else None
            sides = getattr(module, "kernel_size", ())
            if isinstance(sides, tuple) and any(side != 1 for side in sides):
                return str(name)
        return None


def _first(events: list[Any], where: range, kind: str, x: Tensor) -> Any:
    """Position and name of the first event of this kind whose tensor is ``x``."""
    for i in where:
        event, name, tensor, *_ = events[i]
        if event == kind and tensor.shape == x.shape and _same(tensor, x):
            return i, name
    return None


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two live tensors are views of one memory (the trace keeps all of them alive)."""
    return bool(a.untyped_storage()._cdata == b.untyped_storage()._cdata)
