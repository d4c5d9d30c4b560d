"""Calls with key blocks for the tests of compiled kernels."""

from __future__ import annotations

import torch

from sparsiattn import AttentionInputs, Pattern
from sparsiattn.strategies import finish
from sparsiattn.testing import random_inputs


def flex_call(
    grid: tuple[int, int] = (8, 8),
    *,
    k: int = 18,
    prefix: int = 1,
    background: int | None = 2,
    tile: tuple[int, int] = (4, 4),
    block: tuple[int, int] = (2, 2),
    dim: int = 16,
    shared: bool = False,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> tuple[AttentionInputs, Pattern]:
    """Key blocks drawn at random; by default of the shape that `tiny_vit` has with two images.

    shared: one list for all images and heads.
    """
    inputs = random_inputs(
        grid, prefix=prefix, tile=tile, block=block, dim=dim, dtype=dtype, seed=seed
    )
    q, keys, v = (x.to(device) for x in (inputs.q, inputs.k, inputs.v))
    inputs = inputs.replace(q=q, k=keys, v=v)
    n, lead = inputs.n_keys, (1, 1) if shared else (2, 3)
    scores = torch.randn(*lead, n, n, generator=torch.Generator().manual_seed(seed))
    return inputs, finish(Pattern.top(scores.to(device), k), inputs, background=background)
