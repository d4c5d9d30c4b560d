"""`PatchOwner`: what sites and blocks need to know of the patch they belong to."""

from __future__ import annotations

import itertools
from typing import Literal

from torch import nn

from sparsiattn.attention.geometry import Grid
from sparsiattn.runtime import settings
from sparsiattn.runtime.thread_state import MODEL_CALL, Carried
from sparsiattn.strategies.token_base import TokenStrategy

_KEYS = itertools.count(1)


def new_key() -> int:
    """A number that no other patch or site of this process has."""
    return next(_KEYS)


class PatchOwner:
    """The part of a patch that its sites and blocks read and write while the model runs.

    Attributes:
        model: The patched model.
        key: Number of this patch in this process; a copy gets its own.
        alive: False from `unpatch` on. An interrupt can leave a scope open beyond that.
        image: Height and width of the last image in patches, for a backward pass that runs blocks
            again in another thread.
        patch_size: Rows and columns of pixels in a patch.
        tokens: The token strategy, if there is one.
        proportional: Whether merged tokens weigh by their size in attention.
        restores_last: Whether original positions come back after the last block.
        last_pass: Tokens and batch size at the end of the last eager forward pass.
    """

    def __init__(self, model: nn.Module, patch_size: Grid) -> None:
        self.model, self.patch_size = model, patch_size
        self.key = new_key()
        self.alive = True
        self.image: Grid | None = None
        self.tokens: TokenStrategy | None = None
        self.proportional = False
        self.restores_last = False
        self.last_pass: tuple[Carried, int] | None = None

    @property
    def training(self) -> bool:
        """Whether the model is in training mode."""
        return self.model.training

    @property
    def disabled_here(self) -> bool:
        """Whether this thread is inside `Patch.disabled`."""
        return self.key in settings.disabled

    def restores_at(self, last: bool) -> bool:
        """Whether a block's output gets its original positions back in the present forward."""
        return self.key in MODEL_CALL.features or (last and self.restores_last)

    @property
    def restore_mode(self) -> Literal["scatter", "unfold"]:
        """How original positions come back; see `TokenState.restore_patches`."""
        scatters = self.tokens is not None and self.tokens.restore == "scatter"
        return "scatter" if scatters else "unfold"

    def image_grid(self) -> Grid | None:
        """Height and width of the image that this thread last gave to the patched model.

        In patches, up to a common factor.
        """
        image = MODEL_CALL.image
        return image[1:] if image is not None and image[0] == self.key else self.image
