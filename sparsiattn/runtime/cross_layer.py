"""Cross-layer state: tensors that planners store for later sites, checkpoints included."""

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
    """A copy of this forward pass's state, for one site to read and write.

    It is a copy because Dynamo does not let a checkpoint mutate an object created before it;
    `hand_on` makes the copy visible to later sites.

    Args:
        site: The site.
        owner: Its patch.
        first: Whether the site is the first that stores anything.
        group: Identifies the images of this call, if the images of a batch attend separately.

    Raises:
        ModelChanged: A checkpoint recomputes the site, but not the earlier ones that stored state.
    """
    separate = group is None and isinstance(BLOCK_CALL.token_state, PackedTokens)
    if (site.calls > 1 and group is None) or separate:
        return CrossLayerState(owner.key, forgets=True)
    state = MODEL_CALL.cross_layer
    if state is not None and state.owner == owner.key:
        return state.copy(group)
    if not first and in_backward():
        raise ModelChanged(
            f"site {site.name!r} runs again in a backward pass, but the state that earlier blocks "
            "stored for it cannot be found: checkpoint whole blocks, or use a strategy without "
            "cross-layer state"
        )
    return CrossLayerState(owner.key, group=group)


def hand_on(state: CrossLayerState | None) -> None:
    """Make a site's state visible to later sites."""
    if state is not None and not state.forgets:
        MODEL_CALL.cross_layer = state


class RecallCrossLayer:
    """Forward pre-hook of every module that a checkpoint may recompute.

    It notes the state at the time a tensor comes in, and restores it when the same tensor comes in
    again.
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
        noted, state = self.entered.find(x), MODEL_CALL.cross_layer
        if noted is not None:
            MODEL_CALL.cross_layer = noted.copy()
            return
        checkpoints = torch.is_grad_enabled() or x.requires_grad
        if checkpoints and state is not None and state.owner == self.owner.key and state.tensors:
            self.entered.note(x, state.copy())


def enclosing(model: nn.Module, sites: list[Site]) -> list[nn.Module]:
    """The modules that contain the sites and their direct children, each once.

    A checkpoint may recompute a whole block, or only the modules inside its forward.
    """
    modules: dict[int, nn.Module] = {}
    for site in sites:
        names = site.name.split(".")
        for i in range(1, len(names)):
            around = model.get_submodule(".".join(names[:i]))
            modules |= {id(module): module for module in (around, *around.children())}
    return list(modules.values())
