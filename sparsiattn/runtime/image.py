"""The size of the feature map that tokens are made of, from which sites get the token grid."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparsiattn.attention.geometry import Grid
from sparsiattn.attention.layout import NO_IMAGE
from sparsiattn.runtime.hook_tools import RecomputeCache, first_argument, is_functorch
from sparsiattn.runtime.patch_owner import PatchOwner
from sparsiattn.runtime.patch_state import SWITCHING, PatchState
from sparsiattn.runtime.thread_state import MODEL_CALL


def _note(owner: PatchState, size: Grid) -> None:
    MODEL_CALL.image = (owner.key, *size)
    if torch.compiler.is_compiling():
        return
    owner.image = size  # for a backward pass in another thread
    if not owner.recalls_maps and torch.is_grad_enabled():
        _recall_maps(owner)


def _recall_maps(owner: PatchState) -> None:
    """Add hooks that restore the map size in every module that a checkpoint may recompute.

    They are added in the first pass with gradients: without gradients they would only take time.
    """
    with SWITCHING:
        if owner.recalls_maps or not owner.active:
            return
        owner.recalls_maps = True
        for name in owner.attention.entrances:
            recall, entrance = RecallMap(owner), owner.model.get_submodule(name)
            # in front, as the other hooks there read the map size
            hook = entrance.register_forward_pre_hook(recall, prepend=True, with_kwargs=True)
            owner.hooks.append(hook)


class WatchMap:
    """Forward hook of the patch embedding's convolution: notes height and width of its output."""

    def __init__(self, owner: PatchState) -> None:
        self.owner = owner

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.dim() >= 4:
            # frames of a video count as stacked vertically
            frames = output.shape[2] if output.dim() == 5 else 1
            _note(self.owner, (frames * output.shape[-2], output.shape[-1]))


class RecallMap:
    """Forward pre-hook of every module that a checkpoint may recompute: restores the map size.

    Images of two shapes may precede one backward pass, which recomputes blocks in any order.
    """

    def __init__(self, owner: PatchOwner) -> None:
        self.owner = owner
        self.entered: RecomputeCache[tuple[int, int, int]] = RecomputeCache()

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        x = args[0] if args and isinstance(args[0], Tensor) else first_argument(args, kwargs)
        if x is None or not (torch.is_grad_enabled() or x.requires_grad):
            return
        if torch.compiler.is_compiling() or is_functorch(x):
            return
        if torch._C._current_graph_task_id() >= 0:  # in a backward pass
            MODEL_CALL.image = self.entered.find(x) or MODEL_CALL.image
        elif MODEL_CALL.image is not None and MODEL_CALL.image[0] == self.owner.key:
            self.entered.note(x, MODEL_CALL.image)


class WatchImage:
    """Forward pre-hook of the module that takes the image, if no convolution makes its tokens."""

    def __init__(self, owner: PatchState) -> None:
        self.owner = owner

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        image = args[0] if args else next(iter(kwargs.values()), None)
        if isinstance(image, Tensor) and image.dim() == 4:
            _note(self.owner, (image.shape[-2], image.shape[-1]))
        elif isinstance(image, Mapping):
            _note(self.owner, NO_IMAGE)
