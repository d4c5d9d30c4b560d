"""What a learned token score needs beside the task's own loss."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparsiattn.attention.budget import count_of
from sparsiattn.errors import InvalidOption
from sparsiattn.patching.handle import patch_of
from sparsiattn.strategies.keep_predictor import KeepPredictor


def keep_ratio_loss(model: nn.Module) -> Tensor:
    """How far the last training forward was from keeping the shares asked for (a scalar).

    Mean over layers and images of (kept share of all patch tokens - target share)^2, the ratio loss
    of DynamicViT (arXiv 2106.02034, eq. 12); the authors weigh it by 2. Add it to the task's loss
    while training a model patched with ``token_drop(score="learned")``.

    >>> import timm, torch, sparsiattn
    >>> model = timm.create_model("test_vit").train()
    >>> live = sparsiattn.patch(model, "token_drop", score="learned", keep=0.7)
    >>> _ = model(torch.randn(2, 3, 160, 160))
    >>> 0 <= keep_ratio_loss(model).item() < 1
    True
    """
    live = patch_of(model)
    blocks = (
        [] if live is None else [b for b in live.blocks if isinstance(b.planner, KeepPredictor)]
    )
    if not blocks:
        raise InvalidOption(
            "keep_ratio_loss() is for learned token scores, and this model has none: patch it with "
            "patch(model, 'token_drop', score='learned')"
        )
    losses, whole = [], blocks[0].site.grid[0] * blocks[0].site.grid[1]
    count = whole
    for block in blocks:
        planner = block.planner
        assert isinstance(planner, KeepPredictor)
        if planner.share is None or isinstance(planner.keep, str):
            raise InvalidOption(
                "keep_ratio_loss() needs a forward pass in training mode first, and a fixed keep"
            )
        count = count_of(planner.keep, count)
        losses.append((planner.share - count / whole).square().mean())
    return torch.stack(losses).mean()
