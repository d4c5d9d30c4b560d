"""How tensors that planners store reach later sites, and blocks that a checkpoint runs again."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import nn

from sparsiattn.attention.cross_layer_state import CrossLayerState
from sparsiattn.attention.packed import PackedTokens
from sparsiattn.attention.site import Site
from sparsiattn.errors import ModelChanged
from sparsiattn.runtime.hook_tools import RecomputeCache, first_argument, is_functorch
from sparsiattn.runtime.patch_owner import PatchOwner
from sparsiattn.runtime.thread_state import BLOCK_CALL, MODEL_CALL, in_backward


def state_at(
    site: Site, owner: PatchOwner, *, first: bool, group: Hashable = None
) -> CrossLayerState:
    """A copy of this forward pass's state for one site to read and write.

    A copy, because Dynamo lets no checkpoint change an object from before it; `hand_on` makes it
    the one that later sites see.

    Args:
        site: The site.
        owner: Its patch.
        first: Whether the site is the first that stores anything.
        group: Which images these are, where those of a padded batch attend apart.
    """
    apart = group is None and isinstance(BLOCK_CALL.token_state, PackedTokens)
    if site.calls > 1 or apart:
        return CrossLayerState(owner.key, forgets=True)
    state = MODEL_CALL.cross_layer
    if state is not None and state.owner == owner.key:
        return state.copy(group)
    if not first and in_backward():
        raise ModelChanged(
            f"site {site.name!r} runs again in a backward pass, and what earlier blocks kept for "
            "it cannot be found: checkpoint whole blocks, or use a strategy that keeps nothing"
        )
    return CrossLayerState(owner.key, group=group)


def hand_on(state: CrossLayerState | None) -> None:
    """Hand a site's state on to the sites that follow."""
    if state is not None and not state.forgets:
        MODEL_CALL.cross_layer = state


class RecallCrossLayer:
    """Forward pre-hook of whatever a checkpoint may run again.

    It notes what had been stored when this very tensor came in, and brings it back when the tensor
    comes again.
    """

    def __init__(self, owner: PatchOwner) -> None:
        self.owner = owner
        self.entered: RecomputeCache[CrossLayerState] = RecomputeCache()

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if torch.compiler.is_compiling() or self.owner.disabled_here:
            return
        x = first_argument(args, kwargs)
        if x is None or is_functorch(x):
            return
        known, state = self.entered.find(x), MODEL_CALL.cross_layer
        if known is not None:
            MODEL_CALL.cross_layer = known.copy()
            return
        checkpoints = torch.is_grad_enabled() or x.requires_grad
        if checkpoints and state is not None and state.owner == self.owner.key and state.tensors:
            self.entered.note(x, state.copy())


def enclosing(model: nn.Module, sites: list[Site]) -> list[nn.Module]:
    """Modules around the sites, each once, and what is called in them.

    A checkpoint may run a whole block again, or only what is inside its forward.
    """
    modules: dict[int, nn.Module] = {}
    for site in sites:
        names = site.name.split(".")
        for i in range(1, len(names)):
            around = model.get_submodule(".".join(names[:i]))
            modules |= {id(module): module for module in (around, *around.children())}
    return list(modules.values())
