"""The size of the map that tokens are made of, from which attention learns their grid."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparsiattn.attention.geometry import Grid
from sparsiattn.attention.layout import NO_IMAGE
from sparsiattn.runtime.patch_owner import PatchOwner
from sparsiattn.runtime.thread_state import MODEL_CALL


def _note(owner: PatchOwner, size: Grid) -> None:
    MODEL_CALL.image = (owner.key, *size)
    if not torch.compiler.is_compiling():  # for a backward pass in another thread
        owner.image = size


class WatchMap:
    """Forward hook of the convolution that makes tokens: notes rows and columns of its result."""

    def __init__(self, owner: PatchOwner) -> None:
        self.owner = owner

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.dim() >= 4:
            # the frames of a video count as one below the other
            frames = output.shape[2] if output.dim() == 5 else 1
            _note(self.owner, (frames * output.shape[-2], output.shape[-1]))


class WatchImage:
    """Forward pre-hook of a module that takes the image, where no convolution makes its tokens."""

    def __init__(self, owner: PatchOwner) -> None:
        self.owner = owner

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        image = args[0] if args else next(iter(kwargs.values()), None)
        if isinstance(image, Tensor) and image.dim() == 4:
            _note(self.owner, (image.shape[-2], image.shape[-1]))
        elif isinstance(image, Mapping):
            _note(self.owner, NO_IMAGE)
