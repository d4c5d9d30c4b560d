"""`SiteRuntime`: runs one attention call of a patched model."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from enum import Enum, auto
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sparsiattn.attention.inputs import AttentionInputs
from sparsiattn.attention.layout import HostCall, Layout, canonical, host_order, planner_order
from sparsiattn.attention.packing import PackedPart
from sparsiattn.attention.pattern import ComputedPattern, Dense, Pattern
from sparsiattn.attention.site import Site
from sparsiattn.attention.token_state import TokenState
from sparsiattn.errors import ModelChanged
from sparsiattn.kernels.base import Choice, Kernel, choose
from sparsiattn.kernels.choice_cache import ChoiceCache
from sparsiattn.kernels.warmup import warm_kernels
from sparsiattn.runtime import settings
from sparsiattn.runtime.cross_layer import hand_on, state_at
from sparsiattn.runtime.head_groups import head_groups, heads_at_once
from sparsiattn.runtime.measured_speed import MeasuredSpeed
from sparsiattn.runtime.patch_owner import PatchOwner
from sparsiattn.runtime.repeated_calls import RepeatedCalls
from sparsiattn.runtime.thread_state import BLOCK_CALL, SITE_CALLS
from sparsiattn.strategies import finalize
from sparsiattn.strategies.base import Planner, Strategy
from sparsiattn.strategies.dense import DenseStrategy

PLANNER = "sparsiattn"
"""Name of the child module that holds a site's learned planner."""

Observer = Callable[[Site, Planner, AttentionInputs], None]


def is_planner_key(name: str) -> bool:
    """Whether a key of a state dict belongs to a planner.

    >>> is_planner_key("blocks.0.attn.sparsiattn.down"), is_planner_key("blocks.0.attn.qkv.weight")
    (True, False)
    """
    return PLANNER in name.split(".")[:-1]


class PlannerHome(nn.Module):
    """A module around a planner without weights, so that a learned token score can be its child."""

    def __init__(self, planner: Planner) -> None:
        super().__init__()
        self.planner = planner

    def forward(self, inputs: AttentionInputs) -> Pattern:
        return self.planner(inputs)

    @property
    def plans_by_shape(self) -> bool:
        """The planner's own value; False if it has none."""
        return bool(getattr(self.planner, "plans_by_shape", False))


class Decision(Enum):
    """The attention that runs at a site in one call."""

    HOST = auto()
    """The host's own attention."""
    OBSERVE = auto()
    """The host's own attention, after an observer got the operands; see `Patch.observing`."""
    SPARSE = auto()
    """The planner's pattern, computed by a kernel."""


@dataclass(eq=False)
class SiteRuntime:
    """A site with its strategy, planner and kernels: plain state that copies and pickles.

    Attributes:
        site: Properties of the attention call.
        layout: Layout of the host's operands.
        strategy: The strategy with this site's budget.
        planner: The planner that the strategy made for this site.
        kernels: The kernels to choose from.
        explicit: Whether the user named the kernel; there is no fallback then.
        owner: The patch.
        module: The attention module.
        dense: Whether the host's own attention stays, as a sparse kernel would be slower.
        selected: Whether ``sites=`` selected the site; other sites are patched only because a
            token strategy shortens their sequences.
        first_cross_layer: Whether it is the first site that uses cross-layer state.
        last_cross_layer: Whether it is the last one.
        block: Index of the block that contains the site, if the block may carry fewer tokens.
        sums_bias: Whether the host's bias is a sum that can be left uncomputed.
        last_choice: The kernel of the last eager call.
        measured: Result of `measure_sites`; None if not measured.
        choices: Cache of chosen kernels, by the properties of a call.
        repeated: Cache of calls that need no planning.
    """

    site: Site
    layout: Layout
    strategy: Strategy
    planner: Planner
    kernels: tuple[Kernel, ...]
    explicit: bool
    owner: PatchOwner
    module: nn.Module
    dense: bool = False
    selected: bool = True
    first_cross_layer: bool = False
    last_cross_layer: bool = False
    block: int | None = None
    sums_bias: bool = False
    last_choice: Choice | None = None
    measured: MeasuredSpeed | None = None
    choices: ChoiceCache = field(default_factory=ChoiceCache)
    repeated: RepeatedCalls = field(default_factory=RepeatedCalls)

    def __getstate__(self) -> dict[str, Any]:
        # measurements are valid on this machine only, and a copy chooses its own kernels
        return {**self.__dict__, "measured": None, "choices": ChoiceCache()}

    @property
    def is_idle(self) -> bool:
        """Whether the host's own attention runs in every call and nothing reads its operands."""
        if not (self.dense or isinstance(self.strategy, DenseStrategy)):
            return False
        return self.block is None and not self.strategy.uses_cross_layer_state

    def note_measured(self, ratio: float, choice: Choice) -> None:
        """Store a measured speed and the kernel that was measured."""
        self.last_choice = choice
        self.measured = MeasuredSpeed.of(ratio, choice, self.planner)

    def stays_dense(self, n_keys: int) -> bool:
        """Whether the host's own attention runs whatever the plan."""
        # without patch tokens (if all are masked, for example) there are no keys to select
        return self.dense or n_keys <= self.site.prefix_tokens or self.strategy.keeps_all(n_keys)

    def decide(self, n_keys: int) -> Decision:
        """Decide which attention runs for a call with ``n_keys`` keys."""
        observer = settings.observer if settings.are_set() else None
        if observer is not None and observer[0] == self.owner.key:
            return Decision.OBSERVE
        # an interrupt may leave a scope open after unpatch(), so check that the patch is alive
        if self.owner.alive and not self.stays_dense(n_keys):
            return Decision.SPARSE
        return Decision.HOST

    def attention(
        self,
        planner: Planner,
        call: HostCall,
        token_state: TokenState | None = None,
        group: Hashable = None,
        part: PackedPart | None = None,
    ) -> Tensor:
        """The result of the host's call, in the host's own layout.

        Args:
            planner: The site's planner, or that of a replica of `nn.DataParallel`.
            call: The host's arguments, with the mask reduced to the remaining tokens.
            token_state: The remaining tokens, in blocks that carry fewer; else None.
            group: Identifies the images of this call, if the images of a batch attend separately.
            part: As in `canonical`.
        """
        decision = self.decide(call.k.shape[-2])
        block_asks = token_state is not None and BLOCK_CALL.wants_attention
        block_asks = block_asks and BLOCK_CALL.attention is None
        if decision is Decision.HOST and not block_asks:
            return self.host(call)
        inputs = self.inputs(call, token_state, group, part)
        if block_asks:
            BLOCK_CALL.attention = inputs
        if decision is Decision.HOST:
            return self.host(call)
        if decision is Decision.OBSERVE:
            settings.observer[1](self.site, planner, inputs)  # type: ignore[index]
            out = self.host(call)
        else:
            out = self.sparse(planner, inputs, call)
        hand_on(inputs.cross_layer)
        return out

    def inputs(
        self,
        call: HostCall,
        token_state: TokenState | None,
        group: Hashable = None,
        part: PackedPart | None = None,
    ) -> AttentionInputs:
        """The operands in the form that strategies and kernels take."""
        inputs = canonical(
            self.site,
            self.layout,
            call,
            self.owner.maps(),
            tile_for=self.strategy.tile_for,
            block_for=self.strategy.block_for,
            depth_for=self.strategy.depth_for,
            window=getattr(self.module, "window_size", None),
            token_state=token_state,
            part=part,
        )
        if self.strategy.uses_cross_layer_state:
            state = state_at(self.site, self.owner, first=self.first_cross_layer, group=group)
            inputs = inputs.replace(cross_layer=state)
        return inputs

    def sparse(self, planner: Planner, inputs: AttentionInputs, call: HostCall) -> Tensor:
        """Attention by the planner's pattern; the host's own if the pattern keeps every pair.

        Raises:
            ModelChanged: The strategy needs the token grid, which is not known for this call.
        """
        if self.strategy.needs_grid and not inputs.placed:
            raise ModelChanged(
                f"site {self.site.name!r} got {inputs.n_keys} tokens, whose positions in the image "
                f"are not known ({self.site.structure} at patch time), but {self.strategy.name!r} "
                "needs positions: use an attention strategy that does not, e.g. 'topk', or patch "
                "with an input= of this size"
            )
        size = heads_at_once(planner, self.strategy, inputs)
        if size < inputs.q.shape[1] and not self.site.shared:
            return self._in_groups(planner, inputs, call, size)
        pattern = self._metered_plan(planner, inputs)
        if isinstance(pattern, Dense):
            out = self.host(call)
            # converting the host's layout is only needed for planners that read the result
            if hasattr(planner, "after"):
                planner.after(inputs, planner_order(self.layout.fold(out), inputs))
            return out
        choice, heads = self._compute_pattern(inputs, pattern)
        self.repeated.note(self, call, inputs, pattern, choice)
        notify_planner(planner, inputs, heads)
        return self.layout.unfold(host_order(heads, inputs), call.q)

    def _in_groups(
        self, planner: Planner, inputs: AttentionInputs, call: HostCall, size: int
    ) -> Tensor:
        """As `sparse`, ``size`` heads at a time."""
        out = inputs.q.new_empty(*inputs.q.shape[:-1], inputs.v.shape[-1])
        for heads, group in head_groups(inputs, size):
            pattern = self._metered_plan(planner, group)
            out[:, heads] = self._compute_pattern(group, pattern)[1]
        notify_planner(planner, inputs, out)
        return self.layout.unfold(host_order(out, inputs), call.q)

    def _metered_plan(self, planner: Planner, inputs: AttentionInputs) -> Pattern:
        meter = settings.meter
        plan = self.plan if meter is None else partial(meter.plan, self)
        return plan(planner, inputs)

    def _compute_pattern(self, inputs: AttentionInputs, pattern: Pattern) -> tuple[Choice, Tensor]:
        """The kernel for a pattern, and its output."""
        if settings.warming == self.owner.key:
            warm_kernels(self.kernels, inputs, pattern, training=self.module.training)
        choice = self.choose(inputs, pattern)
        heads = self.compute(choice, inputs, pattern)
        if settings.are_set() and not torch.compiler.is_compiling():
            watched = settings.watched
            if watched is not None:
                watched.measure(self.owner, inputs, pattern)
        return choice, heads

    def plan(self, planner: Planner, inputs: AttentionInputs) -> Pattern:
        """The finished pattern of one call; both calls of a differential attention share theirs."""
        shared = SITE_CALLS.shared if self.site.shared else None
        if isinstance(shared, Pattern):
            SITE_CALLS.shared = None
            return shared
        pattern = self.finish(planner(inputs), inputs)
        if self.site.shared and not isinstance(pattern, ComputedPattern):
            SITE_CALLS.shared = pattern
        return pattern

    def finish(self, pattern: Pattern, inputs: AttentionInputs) -> Pattern:
        """Apply the strategy's options to a planner's pattern."""
        return finalize.finish(
            pattern,
            inputs,
            prefix_keys=self.strategy.prefix_keys,
            background=self._background_of(inputs),
            max_keys=self.strategy.max_keys,
        )

    def _background_of(self, inputs: AttentionInputs) -> int | None:
        if not inputs.placed:
            return None
        return self.strategy.background_for(inputs.key_grid, inputs.key_views)

    def choose(self, inputs: AttentionInputs, pattern: Pattern) -> Choice:
        """The kernel for one call; the choice is cached for equal calls."""
        if torch.compiler.is_compiling():  # traced code must not write to the cache, and runs once
            return choose(self.kernels, inputs, pattern, explicit=self.explicit)
        key = self.choices.key(inputs, pattern)
        choice = self.choices.get(key)
        if choice is None:
            choice = choose(self.kernels, inputs, pattern, explicit=self.explicit)
            self.choices.keep(key, choice)
        self.last_choice = choice
        return choice

    def compute(self, choice: Choice, inputs: AttentionInputs, pattern: Pattern) -> Tensor:
        """Compute attention with the chosen kernel."""
        meter = settings.meter
        if meter is None:
            return choice.kernel(inputs, pattern)
        return meter.compute(self, choice, inputs, pattern)  # type: ignore[no-any-return]

    def host(self, call: HostCall) -> Tensor:
        """Compute the host's own attention."""
        meter = settings.meter if settings.are_set() else None
        if meter is None:
            return call.dense()
        return meter.dense(self, call)  # type: ignore[no-any-return]


def notify_planner(planner: Planner, inputs: AttentionInputs, output: Tensor) -> None:
    """Pass the attention output of a site to its planner, if the planner has ``after``."""
    after = getattr(planner, "after", None)
    if after is not None:
        after(inputs, output)
