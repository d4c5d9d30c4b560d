"""A dry run of the patched model: a copy with the same hooks runs one forward pass.

The copy is on the meta device unless the model needs data. The run finds how many tokens reach each
block, what that costs, and whether the model works with fewer tokens at all.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from sparsiattn.attention.inputs import AttentionInputs
from sparsiattn.attention.packed import PackedTokens
from sparsiattn.attention.site import Site
from sparsiattn.attention.token_state import TokenState
from sparsiattn.errors import InvalidOption, SparsiattnError
from sparsiattn.patching.discovery.backbone import backbone_named
from sparsiattn.patching.discovery.example_input import inputs_of
from sparsiattn.patching.discovery.meta_model import (
    MetaInputs,
    meta_copy,
    run_dry,
    shapes,
    value_copy,
)
from sparsiattn.patching.flop_counter import mac_counter, macs_of
from sparsiattn.patching.install import hook_up
from sparsiattn.runtime import settings
from sparsiattn.runtime.block_runtime import BlockRuntime
from sparsiattn.runtime.hook_tools import RecomputeCache
from sparsiattn.runtime.patch_state import PatchState, hook_idle_sites
from sparsiattn.runtime.restore import modules_with_features, unwatch, watch
from sparsiattn.runtime.thread_state import Carried
from sparsiattn.strategies.base import Planner

T = TypeVar("T")


@dataclass
class DryRun:
    """The result of one dry run.

    Attributes:
        counted: Whether MACs were counted, which takes as long as the rest of the run.
        inputs: Inputs of each site, with the tokens that reach it.
        counts: By block index, the number of patch tokens before each of its reductions (several
            if the block runs more than once).
        ragged: Whether images keep different numbers of tokens, so that counts are not known.
        macs: MACs of the whole model with dense attention; 0 unless counted.
        planning: MACs of the reductions only; 0 unless counted.
        output: Shapes of the model's output tensors.
    """

    counted: bool = True
    inputs: dict[str, AttentionInputs] = field(default_factory=dict)
    counts: dict[int, list[int]] = field(default_factory=dict)
    ragged: bool = False
    macs: int = 0
    planning: int = 0
    output: list[torch.Size] = field(default_factory=list)

    def counter(self) -> AbstractContextManager[Any]:
        """A context manager that counts MACs, if they are to be counted."""
        return mac_counter() if self.counted else nullcontext()


@dataclass(eq=False, kw_only=True)
class _DryBlock(BlockRuntime):
    """A block's runtime that records token counts and MACs of its reduction."""

    run: DryRun

    def reduce(self, state: Carried, x: Tensor) -> tuple[Carried, Tensor]:
        self.run.counts.setdefault(self.index, []).append(x.shape[1] - self.site.prefix_tokens)
        out = self._counted(lambda: super(_DryBlock, self).reduce(state, x), x.device)
        self.run.ragged |= isinstance(out[0], PackedTokens)
        return out

    def spare(self, state: TokenState, kept: Tensor) -> TokenState:
        self.run.counts.setdefault(self.index, []).append(kept.shape[1] - state.prefix)
        return self._counted(lambda: super(_DryBlock, self).spare(state, kept), kept.device)

    def _counted(self, call: Callable[[], T], device: torch.device) -> T:
        """Run a reduction and add its MACs."""
        try:
            # the default device, for tensors that a strategy creates without device=
            with self.run.counter() as counter, device:
                out = call()
        except SparsiattnError:
            raise
        except Exception as error:
            name = "" if self.strategy is None else type(self.strategy).__name__
            raise InvalidOption(
                f"block {self.block.name!r}: {name} failed on meta tensors, which count the tokens "
                f"before the model is changed: {type(error).__name__}: {error}. Shapes must not "
                "depend on values: return Reduction.top(scores, keep), or Reduction.where(mask) "
                "if they do"
            ) from error
        self.run.planning += macs_of(counter)
        return out


def dry_inputs(state: PatchState) -> MetaInputs:
    """The inputs of a dry run of the patched model."""
    return inputs_of(state.attention.example, state.model, backbone_named(state.backbone))


def dry_run(state: PatchState, counted: bool = True) -> DryRun:
    """Run one forward pass of a copy that is patched like the model.

    Args:
        state: The patch.
        counted: Whether to count MACs.
    """
    run = DryRun(counted)
    copied = _copied_state(state, run)

    def observe(site: Site, planner: Planner, inputs: AttentionInputs) -> None:
        run.inputs[site.name] = inputs

    with settings.setting("observer", (copied.key, observe)), run.counter() as counter:
        run.output = shapes(run_dry(copied.model, dry_inputs(state), run.counts.clear))
    run.macs = macs_of(counter)
    return run


def dry_copy(state: PatchState, module: nn.Module) -> Any:
    """A copy of a module for `dry_inputs`: on the meta device, or with values if it needs them."""
    return value_copy(module) if state.attention.example.with_values else meta_copy(module)


def _copied_state(state: PatchState, run: DryRun) -> PatchState:
    """The same patch on a copy of the model."""
    backbone = backbone_named(state.backbone)
    copied = copy.copy(state)
    copied.model = dry_copy(state, state.model)
    for override in backbone.attribute_overrides(copied.model):
        override.apply()
    copied.runtimes = [copy.copy(runtime) for runtime in state.runtimes]
    for runtime in copied.runtimes:
        runtime.owner, runtime.module = copied, copied.model.get_submodule(runtime.site.name)
    copied.blocks = [_dry_block(block, copied, run) for block in state.blocks]
    for module in modules_with_features(copied):
        unwatch(module)  # the copy of a patched model still has the marks of the real patch
        watch(module, copied)
    hook_up(copied, backbone)
    hook_idle_sites(copied)
    return copied


def _dry_block(block: BlockRuntime, owner: PatchState, run: DryRun) -> _DryBlock:
    same = {f.name: getattr(block, f.name) for f in fields(BlockRuntime)}
    if isinstance(block.planner, nn.Module):
        same["planner"] = dry_copy(owner, block.planner)
    same |= {"owner": owner, "entered": RecomputeCache(), "inside": RecomputeCache()}
    return _DryBlock(**same, run=run)
