"""A dry run of the patched model: a copy without data carries fewer tokens through the same hooks,
and says how many reach each block, what that costs, and whether the model can do it at all."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from sparsiattn.attention.inputs import AttentionInputs
from sparsiattn.attention.packed import PackedTokens
from sparsiattn.attention.site import Site
from sparsiattn.attention.token_state import TokenState
from sparsiattn.errors import InvalidOption, ProbeFailed, SparsiattnError
from sparsiattn.patching.discovery.meta_cache import recalling
from sparsiattn.patching.discovery.probe import DryInputs, meta_copy, run_dry, shapes
from sparsiattn.registry.registry import REGISTRY
from sparsiattn.runtime.block_runtime import BlockRuntime, Carried
from sparsiattn.runtime.handle import Patch, feature_modules, hook_up
from sparsiattn.runtime.restore import unwatch, watch
from sparsiattn.runtime.sdpa_intercept import THREAD
from sparsiattn.runtime.site_runtime import SiteRuntime
from sparsiattn.strategies.base import Planner

T = TypeVar("T")


class _Untracked:
    """In the place of torch's tracker of modules, of which only totals are wanted: it hooks every
    module's tensors, and fails on views of parameters made without gradients."""

    parents = frozenset({"Global"})

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        return None


def flop_counter() -> Any:
    """Torch's counter of FLOPs, two for each multiply-accumulate, without its tracker."""
    from torch.utils import flop_counter as torchs  # imports triton: only when asked

    from sparsiattn.kernels.native.ops import FLOP_FORMULAS

    formulas: dict[Any, Any] = dict(FLOP_FORMULAS)
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    if fused not in torchs.flop_registry:  # before torch 2.11
        formulas[fused] = _attention_flops
    counter: Any = torchs.FlopCounterMode(display=False, custom_mapping=formulas)
    counter.mod_tracker = _Untracked()
    return counter


def _attention_flops(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    from torch.utils.flop_counter import sdpa_flop_count

    return sdpa_flop_count(q, k, v)  # type: ignore[no-any-return]


@contextmanager
def mac_counter() -> Iterator[Any]:
    """A `flop_counter` at work, for tensors that are most often without data."""
    with recalling(), flop_counter() as counter:
        yield counter


@dataclass
class DryRun:
    """inputs: each site's, at the tokens that reach it. counts: patch tokens before each reduction.
    ragged: whether images keep different numbers of tokens, so that counts are not known.
    macs: of the whole model with dense attention; planning: of the reductions alone; both 0 unless
    they are counted, which takes as long as the rest. output: shapes of what the model returned."""

    counted: bool = True
    inputs: dict[str, AttentionInputs] = field(default_factory=dict)
    counts: dict[int, int] = field(default_factory=dict)
    ragged: bool = False
    macs: int = 0
    planning: int = 0
    output: list[torch.Size] = field(default_factory=list)


class _DryBlock(BlockRuntime):
    """A block's runtime that counts its reduction."""

    run: DryRun

    def reduce(self, token_state: Carried, x: Tensor) -> tuple[Carried, Tensor]:
        self.run.counts[self.index] = x.shape[1] - token_state.prefix
        out = self._counted(lambda: super(_DryBlock, self).reduce(token_state, x))
        self.run.ragged |= isinstance(out[0], PackedTokens)
        return out

    def spare(self, token_state: TokenState, kept: Tensor) -> TokenState:
        self.run.counts[self.index] = kept.shape[1] - token_state.prefix
        return self._counted(lambda: super(_DryBlock, self).spare(token_state, kept))

    def _counted(self, call: Callable[[], T]) -> T:
        """What a reduction returns, its MACs noted."""
        try:
            # the device is for tensors a strategy makes without saying where
            with _counter(self.run) as counter, torch.device("meta"):
                out = call()
        except SparsiattnError:
            raise
        except Exception as error:
            name = "" if self.strategy is None else type(self.strategy).__name__
            raise InvalidOption(
                f"block {self.block.name!r}: {name} failed on tensors without data, by which "
                f"counts are found before a model is touched: {type(error).__name__}: {error}. "
                "Shapes must not depend on values: return Reduction.top(scores, keep), or "
                "Reduction.where(mask) where they do"
            ) from error
        self.run.planning += _macs(counter)
        return out


def meta_inputs(handle: Patch) -> DryInputs:
    """What a dry run of the handle's model takes."""
    adapter = REGISTRY.get("backbones", handle.backbone)
    return adapter.meta_inputs(handle.model, handle.input_shape)  # type: ignore[no-any-return]


def _counter(run: DryRun) -> AbstractContextManager[Any]:
    return mac_counter() if run.counted else nullcontext()


def _macs(counter: Any) -> int:
    return 0 if counter is None else int(counter.get_total_flops()) // 2


def dry_run(handle: Patch, counted: bool = True) -> DryRun:
    """One forward pass of a copy without data, patched like the handle's model. counted: whether
    MACs are wanted."""
    run = DryRun(counted)
    shadow, meta_model = _shadow(handle, run)

    def observe(site: Site, planner: Planner, inputs: AttentionInputs) -> None:
        run.inputs[site.name] = inputs

    before = THREAD.observer
    THREAD.observer = (shadow.key, observe)
    try:
        with _counter(run) as counter:
            run.output = shapes(run_dry(meta_model, meta_inputs(handle)))
    finally:
        THREAD.observer = before
    run.macs = _macs(counter)
    return run


def _shadow(handle: Patch, run: DryRun) -> tuple[Patch, nn.Module]:
    meta_model = meta_copy(handle.model)
    adapter = REGISTRY.get("backbones", handle.backbone)
    for edit in adapter.attribute_overrides(meta_model):
        edit.apply()
    shadow = copy.copy(handle)
    shadow.__setstate__(dict(vars(handle)))
    shadow.model, shadow._handles, shadow._places = meta_model, [], []
    shadow.runtimes = [_dry_site(one, shadow) for one in handle.runtimes]
    shadow.blocks = [_dry_block(one, shadow, run) for one in handle.blocks]
    for module in feature_modules(shadow):
        unwatch(module)
        watch(module, shadow)
    hook_up(shadow, adapter)
    return shadow, meta_model


def _dry_site(runtime: SiteRuntime, shadow: Patch) -> SiteRuntime:
    twin = copy.copy(runtime)
    twin.owner, twin.module = shadow, shadow.model.get_submodule(runtime.site.name)
    return twin


def _dry_block(runtime: BlockRuntime, shadow: Patch, run: DryRun) -> _DryBlock:
    block = _DryBlock.__new__(_DryBlock)
    block.__dict__.update(runtime.__getstate__(), owner=shadow, run=run)
    if isinstance(runtime.planner, nn.Module):
        block.planner = meta_copy(runtime.planner)
    return block


def validate_token_plan(handle: Patch, dense: list[torch.Size]) -> None:
    """Check that the model can carry fewer tokens, and find out what its caller must get. dense:
    shapes of what the model returns without a patch."""
    assert handle.tokens is not None
    bypass = handle.blocks[0].place == "bypass"
    needs_all = False
    try:
        run = dry_run(handle, counted=False)
        needs_all = run.output != dense
    except ProbeFailed as error:  # something behind the blocks takes all tokens, or nothing helps
        if bypass or handle.tokens.restore is None:
            raise _cannot(handle, error) from error
        run, needs_all = DryRun(ragged=handle.tokens.is_ragged()), True
    if not bypass:
        handle.restores_last = _restores_last(handle, needs_all, run.ragged)
    if handle.restores_last:
        try:
            run = dry_run(handle, counted=False)
        except ProbeFailed as error:
            raise _cannot(handle, error) from error
    _check_counts(handle, run)


def _cannot(handle: Patch, error: ProbeFailed) -> InvalidOption:
    return InvalidOption(
        f"{type(handle.model).__name__} cannot carry fewer tokens through these blocks ({error}); "
        "use an attention strategy such as 'connectivity', or other layers="
    )


def _restores_last(handle: Patch, needs_all: bool, ragged: bool) -> bool:
    """Whether original positions come back after the last block: for features, and where plain
    pooling would weigh merged (or padded) tokens wrongly."""
    tokens = handle.tokens
    assert tokens is not None
    pooling = REGISTRY.get("backbones", handle.backbone).pooling(handle.model)
    uneven = (tokens.merges() or ragged) and pooling != "prefix"
    if tokens.restore is None:
        if needs_all or uneven:
            reads = (
                "one feature for each patch"
                if needs_all
                else ("the mean of patches, to which merged (or fewer) tokens would count wrongly")
            )
            raise InvalidOption(
                f"{type(handle.model).__name__} returns (or reads) {reads}, and restore=None never "
                "puts tokens back: use restore='auto'"
            )
        return False
    return needs_all or uneven or tokens.restore != "auto"


def _check_counts(handle: Patch, run: DryRun) -> None:
    for i, (index, count) in enumerate(sorted(run.counts.items())):
        runtime = next(block for block in handle.blocks if block.index == index)
        assert runtime.strategy is not None
        try:
            runtime.strategy.check(count, first=i == 0)
        except SparsiattnError as error:
            raise type(error)(f"block {runtime.block.name!r}: {error}") from None
