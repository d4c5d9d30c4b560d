"""`CrossLayerState`: tensors that planners store for later sites of the same forward pass."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

from sparsiattn.errors import ModelChanged


class CrossLayerState:
    """Named tensors of one forward pass in one thread.

    Attributes:
        owner: Key of the patch whose forward pass this is.
        forgets: Whether `store` does nothing. Set where a site could load a tensor of another
            image or call (images of different lengths, sites that are called several times).
        group: The images of the batch that these tensors belong to, where groups of images attend
            separately.
        tensors: ``(group, name)`` to the tensor and whether gradients were enabled when it was
            stored.
    """

    def __init__(self, owner: int = 0, forgets: bool = False, group: Hashable = None) -> None:
        self.owner, self.forgets, self.group = owner, forgets, group
        self.tensors: dict[tuple[Hashable, str], tuple[Tensor, bool]] = {}

    def copy(self, group: Hashable = None) -> CrossLayerState:
        """A copy that holds the same tensors, for one group of images."""
        copied = CrossLayerState(self.owner, self.forgets, group)
        copied.tensors = dict(self.tensors)
        return copied

    def store(self, name: str, tensor: Tensor) -> None:
        """Store a tensor under that name; it replaces an earlier one."""
        if not self.forgets:
            self.tensors[self.group, name] = (tensor, torch.is_grad_enabled())

    def load(self, name: str) -> Tensor | None:
        """The tensor of that name; None if there is none.

        Raises:
            ModelChanged: It was stored with gradients disabled and is loaded with them enabled.
        """
        if (self.group, name) not in self.tensors:
            return None
        tensor, had_gradients = self.tensors[self.group, name]
        if torch.is_grad_enabled() and not had_gradients:
            raise ModelChanged(
                f"{name!r} was stored with gradients disabled and is loaded with them enabled, as "
                "in blocks checkpointed with use_reentrant=True; the gradient between blocks would "
                "be lost: checkpoint with use_reentrant=False"
            )
        return tensor
