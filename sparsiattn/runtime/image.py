"""The shape of the image that a model is given, from which attention learns its token grid."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparsiattn.attention.layout import NO_IMAGE
from sparsiattn.runtime.patch_owner import PatchOwner
from sparsiattn.runtime.thread_state import MODEL_CALL


class WatchImage:
    """Forward pre-hook of the module that takes the image: notes its height and width."""

    def __init__(self, owner: PatchOwner) -> None:
        self.owner = owner

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        image = args[0] if args else next(iter(kwargs.values()), None)
        if isinstance(image, Tensor) and image.dim() == 4:
            rows, columns = self.owner.patch_size
            # height and width in patches, up to a common factor
            size = (image.shape[-2] * columns, image.shape[-1] * rows)
        elif isinstance(image, Mapping):
            size = NO_IMAGE
        else:
            return
        MODEL_CALL.image = (self.owner.key, *size)
        if not torch.compiler.is_compiling():  # for a backward pass in another thread
            self.owner.image = size
