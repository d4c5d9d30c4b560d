"""The two hooks of a patched attention module, which open and close its scope.

While the scope is open, the module's call of scaled dot product attention is computed by the site's
route (`sparsiattn.runtime.sdpa_intercept`).
"""

from __future__ import annotations

import sys
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sparsiattn.attention.layout import HostCall
from sparsiattn.errors import ModelChanged
from sparsiattn.runtime import settings
from sparsiattn.runtime.hook_tools import ScriptRefusal, refuse_fx
from sparsiattn.runtime.ownership import runs_in_another, surroundings
from sparsiattn.runtime.packed_images import packed_attention
from sparsiattn.runtime.patch_owner import PatchOwner, new_key
from sparsiattn.runtime.reduced_attention import full_attention, reduced_attention
from sparsiattn.runtime.sdpa_intercept import (
    forget_abandoned,
    forget_caller,
    note_caller,
    note_nested_caller,
    pop,
    push,
)
from sparsiattn.runtime.site_runtime import PLANNER, SiteRuntime
from sparsiattn.runtime.thread_state import BLOCK_CALL, MODEL_CALL, SITE_CALLS, Route
from sparsiattn.strategies.base import Planner

IDLE = "_sparsiattn_idle_site"
"""Name under which the ``__dict__`` of an idle site's module holds its `OpenScope`, unhooked."""


def make_route(runtime: SiteRuntime, replica: nn.Module | None = None) -> Route:
    """The function that computes the site's call of scaled dot product attention.

    It keeps a reference to ``runtime`` without reading it, as a runtime that is being copied may
    still be incomplete.

    Args:
        runtime: The site.
        replica: The planner of a replica of `nn.DataParallel`, which has its own weights.
    """

    def route(call: HostCall) -> Tensor:
        planner = runtime.planner if replica is None else cast(Planner, replica)
        state = BLOCK_CALL.token_state
        if runtime.site.packed and state is None:
            return packed_attention(runtime, planner, call)
        if state is None and replica is None:
            out = runtime.repeated.run(runtime, call)
            if out is not None:
                return out
        site_position = runtime.owner.key, runtime.block
        if state is not None and (state.owner, state.layer) == site_position:
            return reduced_attention(runtime, planner, state, call)
        return full_attention(runtime, planner, call)

    return route


class OpenScope(ScriptRefusal):
    """Forward pre-hook of a patched attention module.

    It can be pickled: its route, a closure, is created again in a copy.
    """

    def __init__(self, runtime: SiteRuntime) -> None:
        self.__setstate__({"runtime": runtime})

    def __getstate__(self) -> dict[str, Any]:
        return {"runtime": self.runtime}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.runtime: SiteRuntime = state["runtime"]
        self.key = new_key()  # a copy opens scopes of its own
        self.route = make_route(self.runtime)

    def __call__(self, module: nn.Module, args: Any) -> None:
        refuse_fx(args)
        has_settings = settings.are_set()
        if not has_settings and self.runtime.is_idle:
            return
        owner, elsewhere, model_call = self.runtime.owner, False, None
        compiling = has_settings and torch.compiler.is_compiling()
        if not compiling:
            elsewhere, model_call = surroundings(owner, module, sys._getframe(1))
        if elsewhere or ((has_settings or owner.went_dense) and owner.disabled_here):
            push(None, self.key)
        elif "_is_replica" in vars(module):  # nn.DataParallel: the replica's own weights
            push(make_route(self.runtime, module._modules.get(PLANNER)), self.key)
        else:
            push(self.route, self.key)
        if self.runtime.site.shared:
            SITE_CALLS.shared = None
        SITE_CALLS.offset = 0
        if self.runtime.first_cross_layer:
            forget_abandoned()
            MODEL_CALL.cross_layer = None
        if compiling:
            return
        SITE_CALLS.routed.discard(self.key)
        if model_call is None:
            note_caller(self.key)
        else:
            note_nested_caller(self.key, model_call)


class CloseScope(ScriptRefusal):
    """Forward hook of a patched attention module, also called when the module raised."""

    def __init__(self, opener: OpenScope) -> None:
        self.opener = opener

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        key, runtime = self.opener.key, self.opener.runtime
        pop(key)
        if runtime.last_cross_layer:
            MODEL_CALL.cross_layer = None
        has_settings = settings.are_set()
        if (has_settings and torch.compiler.is_compiling()) or key not in SITE_CALLS.callers:
            return
        forget_caller(key)
        owner = runtime.owner
        if output is None or ((has_settings or owner.went_dense) and owner.disabled_here):
            return
        if key not in SITE_CALLS.routed and not runs_in_another(owner, module):
            raise ModelChanged(
                f"site {runtime.site.name!r} ran without calling scaled dot product attention, so "
                "the patch had no effect there. Was fused_attn switched off or its forward "
                "replaced after patching? unpatch() and patch again"
            )


def hook_scope(module: nn.Module, opener: OpenScope) -> list[RemovableHandle]:
    """Register the two hooks of a site."""
    # always_call: a module that raises must not leave its scope open
    closing = module.register_forward_hook(CloseScope(opener), always_call=True)
    return [module.register_forward_pre_hook(opener), closing]


def owner_of(module: nn.Module) -> PatchOwner | None:
    """The patch that has this module as a site; None if there is none."""
    hooks = (*module._forward_pre_hooks.values(), vars(module).get(IDLE))
    return next((hook.runtime.owner for hook in hooks if isinstance(hook, OpenScope)), None)
