"""Attention calls like an earlier one of their site, which need no planning.

Where a plan says nothing of values, as that of `TopKeys`, whose keys the kernel finds, everything
between the host's call and the kernel's depends on layouts and modes alone. At small sizes that
takes as long as the attention itself.
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
    """What is read and written here of a `SiteRuntime`."""

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
    """The kernel's part of calls alike, and what it was chosen with.

    Attributes:
        attend: Attention of q, k and v.
        choice: The kernel.
        site: The site at that time.
        strategy: Its strategy.
        planner: Its planner.
        kernels: Its kernels.
        prices: Number of the prices by which the kernel was chosen.
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
    """What runs for calls alike, by all that their plan depends on; copies start empty.

    Attributes:
        known: By `_key`.
        by_shape: Whether the site's plans depend on shapes alone, as it was when the present pass
            of the model began.
    """

    known: dict[Hashable, RepeatableCall] = field(default_factory=dict)
    by_shape: bool = False

    def __getstate__(self) -> dict[str, Any]:
        return {"known": {}}

    def look_at(self, planner: Planner) -> None:
        """Ask a planner whether its plans depend on shapes alone.

        All planners are asked before the model runs: one that learns looks at its weights for that,
        which takes several times as long between two layers.
        """
        self.by_shape = bool(getattr(planner, "plans_by_shape", False))

    def run(self, runtime: PlannedSite, call: HostCall) -> Tensor | None:
        """What an equal call would return; None where none was noted."""
        # in this order, or Dynamo guards what is known
        if settings.are_set() or not self.known or not _is_plain(call):
            return None
        if not self._plans_by_shape(runtime):
            return None
        known = self.known.get(_key(runtime, call))
        if known is None or not known.holds_for(runtime):
            return None
        runtime.last_choice = known.choice
        return known.attend(call.q, call.k, call.v)

    def note(
        self,
        runtime: PlannedSite,
        call: HostCall,
        inputs: AttentionInputs,
        pattern: Pattern,
        choice: Choice,
    ) -> None:
        """Note a call, if the next one like it may leave planning out."""
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
        """Whether the site is sparse, by plans that depend on shapes alone."""
        if not runtime.owner.alive or runtime.dense:
            return False
        if runtime.owner.key not in MODEL_CALL.inside:  # a part of the model, called by itself
            self.look_at(runtime.planner)
        return self.by_shape


def _is_plain(call: HostCall) -> bool:
    """Whether nothing beside layouts and modes has a say in this call.

    No mask, dropout, gradient, autocast or transform.
    """
    if call.mask is not None or call.dropout or call.causal or call.gqa:
        return False
    if torch.is_grad_enabled() or torch._C._is_any_autocast_enabled():
        return False
    return type(call.v) is Tensor and is_unobserved(call.q, call.k)


def _took_operands_as_they_are(
    runtime: PlannedSite, call: HostCall, inputs: AttentionInputs
) -> bool:
    """Whether planner and kernel saw the host's own tensors, and the host gets the kernel's."""
    if runtime.site.shared or runtime.strategy.uses_cross_layer_state:
        return False
    if hasattr(runtime.planner, "after") or inputs.bias is not None:
        return False
    # a host's window may change without a sign of it in the call
    if getattr(runtime.module, "window_size", None) is not None or inputs.token_state is not None:
        return False
    plain_layout = runtime.layout.form == "b h n d" and not runtime.site.reordered
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
