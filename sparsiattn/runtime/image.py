"""The sizes of feature maps and images in a pass, from which sites get the token grid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparsiattn.attention.geometry import Grid
from sparsiattn.attention.layout import NO_IMAGE
from sparsiattn.attention.packing import PackedInput, Packing, sizes_of_rows
from sparsiattn.errors import InvalidOption
from sparsiattn.runtime.hook_tools import (
    RecomputeCache,
    first_argument,
    is_functorch,
    pre_hook_in_front,
    tensors_in,
)
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


def note_packing(owner: PatchState, packing: Packing | None) -> None:
    """Note the sizes of the images in a sequence of several; None at its end."""
    MODEL_CALL.packing = None if packing is None else (owner.key, packing)
    if packing is None or torch.compiler.is_compiling():
        return
    owner.packing = packing
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
            hook = pre_hook_in_front(entrance, recall, with_kwargs=True)
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
        self.entered: RecomputeCache[tuple[Any, Any]] = RecomputeCache()

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        x = args[0] if args and isinstance(args[0], Tensor) else first_argument(args, kwargs)
        if x is None or not (torch.is_grad_enabled() or x.requires_grad):
            return
        if torch.compiler.is_compiling() or is_functorch(x):
            return
        if torch._C._current_graph_task_id() >= 0:  # in a backward pass
            noted = self.entered.find(x) or (MODEL_CALL.image, MODEL_CALL.packing)
            MODEL_CALL.image, MODEL_CALL.packing = noted
            return
        noted = MODEL_CALL.image, MODEL_CALL.packing
        if any(record is not None and record[0] == self.owner.key for record in noted):
            self.entered.note(x, noted)


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


class WatchPacked:
    """Forward pre-hook of the module that takes several images: notes their sizes."""

    def __init__(self, owner: PatchState, packed: PackedInput) -> None:
        self.owner, self.packed = owner, packed

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if torch.compiler.is_compiling() or self.owner.disabled_here:
            packing = None
        else:
            packing = read_packing(self.packed, module, args, kwargs)
        note_packing(self.owner, packing)


class ForgetPacked:
    """Forward hook of that module: the sizes do not hold for parts that run on their own later."""

    def __init__(self, owner: PatchState) -> None:
        self.owner = owner

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        note_packing(self.owner, None)


def read_packing(
    packed: PackedInput, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Packing | None:
    """The sizes of the images of one call; None if the call does not state them.

    Args:
        packed: How the module takes images.
        module: The module.
        args: Positional arguments of the call.
        kwargs: Keyword arguments of the call.

    Raises:
        InvalidOption: They do not add up to the number of patches.
    """
    given = packed.arguments(module.forward, args, kwargs)
    sizes, bounds = given.get(packed.sizes), given.get(packed.bounds)
    if packed.by_row:
        images = sizes_of_rows(sizes) if isinstance(sizes, Tensor) and not sizes.is_meta else None
        return None if images is None else packed.packing(images)
    if not isinstance(sizes, Tensor) or sizes.is_meta or sizes.dim() != 2 or sizes.shape[1] != 3:
        return None
    rows = sizes.tolist()
    packing = packed.packing([(frames, height, width) for frames, height, width in rows])
    patches = [x for x in tensors_in((args, dict(kwargs))) if x.is_floating_point()]
    if patches and len(patches[0]) != packing.tokens:
        raise InvalidOption(
            f"{packed.sizes} gives {packing.tokens} patches ({packing}), but the model got "
            f"{len(patches[0])}: frames x rows x columns of all images must add up to that"
        )
    if isinstance(bounds, Tensor) and not bounds.is_meta:
        lengths = bounds.diff().tolist()
        if packing.follow(lengths) is None:
            raise InvalidOption(
                f"{packed.bounds} gives sequences of {lengths} tokens, but {packed.sizes} gives "
                f"{packing.tokens} patches ({packing}): each image or frame must be a sequence"
            )
    return packing
