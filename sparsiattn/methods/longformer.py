"""Longformer: a window around every patch, and global tokens.

Longformer: The Long-Document Transformer, arXiv 2004.05150.
"""

from __future__ import annotations

from dataclasses import dataclass

from sparsiattn import AttentionInputs, Pattern, Strategy
from sparsiattn.methods._grid import local_and_global, patch_pattern
from sparsiattn.methods._options import check_count, check_odd


@dataclass(frozen=True)
class Longformer(Strategy):
    """Sliding window with global tokens (section 3.1 of the paper), on the 2-D grid of patches.

    A patch attends to patches at most ``window // 2`` steps away in both directions, where a step
    is ``dilation`` patches. Windows are cut off at the border. Prefix tokens are global: they
    attend to all tokens, and all tokens attend to them.

    Args:
        window: Side of the window in patches, odd. One more than twice the grid's longer side, at
            dilation 1, reaches every key.
        dilation: Distance of neighbouring keys in patches.
        global_patches: g for g x g evenly spaced patches that are global too, for models without a
            class token.

    Raises:
        InvalidOption: The window is even.

    >>> Longformer(window=5).to_dict()["options"]["dilation"]
    1
    """

    name = "longformer"
    paper = "https://arxiv.org/abs/2004.05150"
    fidelity = (
        "inspired by: the window is a square in the image as in Vision Longformer, not a run of "
        "tokens, and global tokens have no projections of their own"
    )
    needs_training = True
    needs_grid = True

    window: int = 7
    dilation: int = 1
    global_patches: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_odd("window", self.window)
        check_count("dilation", self.dilation)
        check_count("global_patches", self.global_patches, 0)

    def plan(self, inputs: AttentionInputs) -> Pattern:
        sizes = self.window, self.dilation, self.global_patches
        return patch_pattern(inputs.table(local_and_global, inputs.image_grid, *sizes), inputs)
