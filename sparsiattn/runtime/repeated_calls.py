"""A cache of attention calls that equal an earlier call of their site and need no planning.

If a plan does not depend on tensor values (as for `TopKeys`, whose keys the kernel finds), all work
between the host's call and the kernel's call depends only on shapes, strides and modes. At small
sizes that work takes as long as the attention itself.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from sparsiattn.attention.derivatives import is_unobserved
from sparsiattn.attention.inputs import AttentionInputs
from sparsiattn.attention.layout import HostCall, Layout
from sparsiattn.attention.pattern import Pattern
from sparsiattn.attention.site import Site
from sparsiattn.kernels import cost
from sparsiattn.kernels.base import Choice, Kernel
from sparsiattn.runtime import settings
from sparsiattn.runtime.patch_owner import PatchOwner
from sparsiattn.runtime.thread_state import MODEL_CALL
from sparsiattn.strategies.base import Planner, Strategy

_MOST_CALLS = 16


class PlannedSite(Protocol):
    """The attributes of a `SiteRuntime` that are used here."""

    site: Site
    layout: Layout
    strategy: Strategy
    planner: Planner
    kernels: tuple[Kernel, ...]
    owner: PatchOwner
    module: nn.Module
    dense: bool
    last_choice: Choice | None


class RepeatableCall(NamedTuple):
    """The kernel call of equal attention calls, and the state it was chosen in.

    Attributes:
        attend: Function that computes attention of q, k and v.
        choice: The chosen kernel.
        site: The site at that time.
        strategy: The strategy at that time.
        planner: The planner at that time.
        kernels: The kernels to choose from at that time.
        prices: Generation of the kernel costs (`cost.generation`) that the choice is based on.
    """

    attend: Callable[[Tensor, Tensor, Tensor], Tensor]
    choice: Choice
    site: Site
    strategy: Strategy
    planner: Planner
    kernels: tuple[Kernel, ...]
    prices: int

    def holds_for(self, runtime: PlannedSite) -> bool:
        """Whether a plan made now would be the same."""
        return (
            self.planner is runtime.planner
            and self.site is runtime.site
            and self.strategy is runtime.strategy
            and self.kernels is runtime.kernels
            and self.prices == cost.generation()
        )


@dataclass(eq=False)
class RepeatedCalls:
    """Cached calls of one site; copies start empty.

    Attributes:
        known: The cached calls by `_key`.
        by_shape: Whether the site's plans depend only on shapes, as determined when the current
            pass of the model began.
    """

    known: dict[Hashable, RepeatableCall] = field(default_factory=dict)
    by_shape: bool = False

    def __getstate__(self) -> dict[str, Any]:
        return {"known": {}}

    def look_at(self, planner: Planner) -> None:
        """Read from a planner whether its plans depend only on shapes.

        This is done for all planners before the model runs: a learned planner inspects its weights
        for it, which takes several times as long between two layers.
        """
        self.by_shape = bool(getattr(planner, "plans_by_shape", False))

    def run(self, runtime: PlannedSite, call: HostCall) -> Tensor | None:
        """The result of a call by its cached kernel; None if no equal call is cached."""
        # this order keeps Dynamo from guarding the cache
        if settings.are_set() or not self.known or not _is_plain(call):
            return None
        if not self._plans_by_shape(runtime):
            return None
        cached = self.known.get(_key(runtime, call))
        if cached is None or not cached.holds_for(runtime):
            return None
        runtime.last_choice = cached.choice
        return cached.attend(call.q, call.k, call.v)

    def note(
        self,
        runtime: PlannedSite,
        call: HostCall,
        inputs: AttentionInputs,
        pattern: Pattern,
        choice: Choice,
    ) -> None:
        """Cache a call, if equal calls can skip planning."""
        if settings.are_set() or not _is_plain(call) or not self._plans_by_shape(runtime):
            return
        if not _took_operands_as_they_are(runtime, call, inputs):
            return
        attend = choice.kernel.repeatable(inputs, pattern)
        if attend is None:
            return
        if len(self.known) >= _MOST_CALLS:  # shapes that never repeat
            self.known = {}
        decided = runtime.site, runtime.strategy, runtime.planner, runtime.kernels
        self.known[_key(runtime, call)] = RepeatableCall(
            attend, choice, *decided, cost.generation()
        )

    def _plans_by_shape(self, runtime: PlannedSite) -> bool:
        """Whether the site is sparse and its plans depend only on shapes."""
        if not runtime.owner.alive or runtime.dense:
            return False
        if runtime.owner.key not in MODEL_CALL.inside:  # a submodule was called on its own
            self.look_at(runtime.planner)
        return self.by_shape


def _is_plain(call: HostCall) -> bool:
    """Whether the call depends only on its operands' layouts and the modes of torch.

    It has no mask, dropout, gradient, autocast or functorch transform.
    """
    if call.mask is not None or call.dropout or call.causal or call.gqa:
        return False
    if torch.is_grad_enabled() or torch._C._is_any_autocast_enabled():
        return False
    return type(call.v) is Tensor and is_unobserved(call.q, call.k)


def _took_operands_as_they_are(
    runtime: PlannedSite, call: HostCall, inputs: AttentionInputs
) -> bool:
    """Whether operands and result pass unchanged between the host and the kernel."""
    if runtime.site.shared or runtime.strategy.uses_cross_layer_state:
        return False
    if hasattr(runtime.planner, "after") or inputs.bias is not None:
        return False
    # the window of a host may change without changing the call
    if getattr(runtime.module, "window_size", None) is not None or inputs.token_state is not None:
        return False
    plain_layout = runtime.layout.form == "b h n d" and inputs.order is None
    return plain_layout and inputs.q is call.q and inputs.k is call.k and inputs.v is call.v


def _key(runtime: PlannedSite, call: HostCall) -> Hashable:
    q, k, v = call.q, call.k, call.v
    layouts = (q.shape, q.stride(), k.shape, k.stride(), v.shape, v.stride())
    kinds = (q.dtype, k.dtype, v.dtype, q.device, call.scale, runtime.owner.maps())
    modes = (
        torch.is_inference_mode_enabled(),
        q.is_inference(),
        torch.are_deterministic_algorithms_enabled(),
    )
    return layouts, kinds, modes
