"""`CrossLayerState`: tensors that planners leave for later sites of one forward pass."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

from sparsiattn.errors import ModelChanged


class CrossLayerState:
    """Tensors by name, of one forward pass in one thread.

    Attributes:
        owner: Key of the patch whose forward pass this is.
        forgets: Whether nothing is stored, where sites could not tell whose tensor they load
            (images of their own lengths, sites called several times).
        group: Which images of a batch these tensors are of, where they attend apart.
        tensors: Group and name to the tensor and whether gradients were enabled when it was stored.
    """

    def __init__(self, owner: int = 0, forgets: bool = False, group: Hashable = None) -> None:
        self.owner, self.forgets, self.group = owner, forgets, group
        self.tensors: dict[tuple[Hashable, str], tuple[Tensor, bool]] = {}

    def copy(self, group: Hashable = None) -> CrossLayerState:
        """The same tensors in a record of their own, for one group of images."""
        copied = CrossLayerState(self.owner, self.forgets, group)
        copied.tensors = dict(self.tensors)
        return copied

    def store(self, name: str, tensor: Tensor) -> None:
        """Keep a tensor under that name, in place of an earlier one."""
        if not self.forgets:
            self.tensors[self.group, name] = (tensor, torch.is_grad_enabled())

    def load(self, name: str) -> Tensor | None:
        """The tensor of that name; None if there is none.

        Raises:
            ModelChanged: It was stored without gradients and is needed with them.
        """
        if (self.group, name) not in self.tensors:
            return None
        tensor, had_gradients = self.tensors[self.group, name]
        if torch.is_grad_enabled() and not had_gradients:
            raise ModelChanged(
                f"{name!r} was kept without gradients and is asked for with them, as in blocks "
                "checkpointed with use_reentrant=True, which would lose the gradient of what "
                "passes between blocks: checkpoint with use_reentrant=False"
            )
        return tensor
