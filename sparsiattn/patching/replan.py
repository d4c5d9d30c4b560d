"""Plans token strategies again when the model has changed after patching.

The head, the pooling or the input size may change (`reset_classifier`, `set_input_size`). The new
plan must be the same as if the model had been changed first and patched afterwards.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from sparsiattn.attention.block import Block
from sparsiattn.errors import ModelChanged, SparsiattnError, first_line
from sparsiattn.patching.discovery.backbone import backbone_named
from sparsiattn.patching.discovery.blocks import find_blocks, in_training
from sparsiattn.patching.discovery.consumers import Consumers
from sparsiattn.patching.known_calls import know_call, know_training
from sparsiattn.patching.survey import ModelSurvey, survey, survey_again
from sparsiattn.patching.token_blocks import token_blocks
from sparsiattn.patching.token_plan import (
    placement_of,
    reads_prefix,
    validate_token_plan,
)
from sparsiattn.patching.towers import class_tokens_of, consumers_of, find_towers
from sparsiattn.runtime.block_runtime import BlockRuntime
from sparsiattn.runtime.hook_tools import pre_hook_in_front
from sparsiattn.runtime.patch_state import SWITCHING, PatchState
from sparsiattn.runtime.thread_state import BLOCK_CALL, MODEL_CALL, SITE_CALLS

_PLAIN = (str, bool, type(None))
"""Types of attributes that describe how a model is built; numbers may be counters."""


class AskAgain:
    """Forward pre-hook that plans again if the model is no longer the one that was patched.

    Attributes:
        owner: The patch.
        outline: The properties of the model that the current plan depends on.
        rates: Which rates (dropout, drop path) inside the blocks are zero, so that training mode
            changes nothing there.
    """

    def __init__(self, owner: PatchState) -> None:
        self.owner = owner
        self.outline, self.rates = outline_of(owner), _rates(owner)
        self._enlist()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._enlist()

    def _enlist(self) -> None:
        self.key = next(_KEYS)
        _HOOKS[self.key] = self

    def __call__(self, module: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling():
            _ask(self.key)
        else:
            self.ask()

    def ask(self) -> None:
        """Plan again if the model has changed."""
        owner = self.owner
        if owner.disabled_here or not owner.alive:
            return
        outline = outline_of(owner)
        rates = _rates(owner) if owner.training else self.rates
        if (outline, rates) == (self.outline, self.rates):
            return
        with SWITCHING, _undisturbed():
            plan_again(owner, resized=outline[0] != self.outline[0])
        self.outline, self.rates = outline, rates


_KEYS = itertools.count(1)
_HOOKS: weakref.WeakValueDictionary[int, AskAgain] = weakref.WeakValueDictionary()


def _ask(key: int) -> bool:
    """Call `AskAgain.ask` while a graph is traced; a model that changed is traced again.

    Dynamo runs this function instead of tracing it, and passes numbers only.
    """
    hook = _HOOKS.get(key)
    if hook is not None:
        hook.ask()
    return True


# as `torch.compiler.assume_constant_result` does, which would import all of Dynamo
_ask._dynamo_marked_constant = True  # type: ignore[attr-defined]


def watch_changes(state: PatchState) -> None:
    """Check for changes before every forward pass of a model that carries fewer tokens."""
    if state.blocks:
        # before the other hooks, which use the plan
        hook = pre_hook_in_front(state.model, AskAgain(state))
        state.hooks.append(hook)


def outline_of(state: PatchState) -> tuple[Any, ...]:
    """The properties that the plan depends on: the input size, and the model around its blocks."""
    shape = backbone_named(state.backbone).input_shape(state.model)
    return shape, tuple(_around(state))


def _around(state: PatchState) -> Iterator[Any]:
    """Class, settings and parameter names of every module outside the lists of blocks."""
    lists = {runtime.block.name.rpartition(".")[0] for runtime in state.blocks} - {""}
    switched = {override.attribute for override in state.overrides} | {"training"}
    waiting: list[tuple[str, nn.Module]] = [("", state.model)]
    while waiting:
        name, module = waiting.pop()
        yield name, _host_class(type(module))  # type: ignore[arg-type]
        for key, value in vars(module).items():
            if isinstance(value, _PLAIN) and key not in switched and not key.startswith("_"):
                yield key, value
        yield tuple(key for key, weight in module._parameters.items() if weight is not None)
        if name not in lists:
            parts = module.named_children()
            waiting.extend((f"{name}.{key}" if name else key, part) for key, part in parts)


@lru_cache(maxsize=256)  # called for every module around the blocks, before every pass
def _host_class(kind: type[nn.Module]) -> str:
    """The name of a module's class, without the equivalent subclass that `fully_shard` adds."""
    classes = kind.__mro__
    names = [f"{kind.__module__.partition('.')[0]}.{kind.__name__}" for kind in classes]
    below = names.index("torch.FSDPModule") + 1 if "torch.FSDPModule" in names else 0
    return f"{classes[below].__module__}.{classes[below].__qualname__}"


def _rates(state: PatchState) -> tuple[bool, ...]:
    reducing = (r for r in state.blocks if r.placement in ("middle", "bypass"))
    modules = (m for r in reducing for m in state.model.get_submodule(r.block.name).modules())
    return tuple(value == 0 for m in modules for value in vars(m).values() if type(value) is float)


def plan_again(state: PatchState, *, resized: bool) -> None:
    """Plan for the model as it is now.

    Args:
        state: The patch.
        resized: Whether the model's input size has changed.

    Raises:
        ModelChanged: The hooks do not fit the changed model; it must be patched again.
    """
    names = {site.name for site in state.sites}
    try:
        if state.follows_model or resized:
            surveyed = survey(state.model, None, names, given=state.structure)
        else:
            surveyed = survey_again(state, names)
        attention = surveyed.attention(state.model)
        known = {site.name for site, _ in attention.sites}
        _need(state, all(site.name in known for site in state.sites), "its attention")
        consumers = _renew_blocks(state, surveyed)
        state.describe_anew(attention)
        state.reads_prefix = reads_prefix(state, consumers)
        state.known_calls.clear()
        know_call(state, surveyed)
        validate_token_plan(state, consumers, surveyed.returned)
        if state.shortens:
            know_training(state, surveyed)
    except ModelChanged:
        raise
    except SparsiattnError as error:
        raise _changed(state, first_line(error)) from error


def _renew_blocks(state: PatchState, surveyed: ModelSurvey) -> Consumers:
    """Update the descriptions of the patch's blocks, and find the consumers of their outputs."""
    model, inputs = state.model, surveyed.inputs()
    sites = {site.name: site for site, _ in surveyed.sites}
    blocks = find_blocks(surveyed.meta_model, sites, inputs)
    assert state.tokens is not None
    chosen = token_blocks(blocks, sites, surveyed.map_module, state.tokens)
    state.whole_blocks = chosen.others
    blocks, plain = in_training(surveyed.meta_model, chosen.blocks, inputs), chosen.plain
    by_name = {block.name: block for block in blocks}
    consumers = consumers_of(surveyed.meta_model, blocks, sites, inputs) if plain else Consumers()
    for runtime in state.blocks:
        block = by_name.get(runtime.block.name)
        _need(state, block is not None, f"its block {runtime.block.name!r}")
        assert block is not None
        _need(state, _reduces_alike(runtime, block, plain), f"how {block.name!r} ends")
        runtime.block = block
    if plain:
        for tower in find_towers(blocks, consumers, type(model).__name__):
            count = class_tokens_of(surveyed.backbone, model, tower, sites)
            inside = {block.name for block in tower.blocks}
            alike = (r.class_tokens == count for r in state.blocks if r.block.name in inside)
            _need(state, all(alike), "its class tokens")
    return consumers


def _reduces_alike(runtime: BlockRuntime, block: Block, plain: bool) -> bool:
    """Whether a block still reduces where its hooks are."""
    before, now = runtime.block.tail, block.tail
    if runtime.placement in ("middle", "bypass"):
        ends = [None if tail is None else tail.ends for tail in (before, now)]
        if ends[0] != ends[1]:
            return False
    if runtime.strategy is None:
        return True
    name = type(runtime.owner.model).__name__
    return placement_of(runtime.strategy, block, plain, name) == runtime.placement


def _need(state: PatchState, condition: bool, what: str) -> None:
    if not condition:
        raise _changed(state, f"{what} has changed")


def _changed(state: PatchState, why: str) -> ModelChanged:
    return ModelChanged(
        f"{type(state.model).__name__} was changed after patching ({why}); call unpatch() and "
        "patch the changed model again"
    )


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Restore this thread's records on exit, since another model may be running."""
    records = (SITE_CALLS, BLOCK_CALL, MODEL_CALL)
    before = [dict(vars(record)) for record in records]
    try:
        with torch.inference_mode(False):
            yield
    finally:
        for record, slots in zip(records, before, strict=True):
            vars(record).update(slots)
