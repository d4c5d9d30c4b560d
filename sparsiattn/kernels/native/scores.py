"""Planning in compiled code: what decides over small sites, where torch's calls cost more than the
arithmetic. Only where the `native` kernel was compiled before, in float32 on a CPU without a
gradient; elsewhere, and while a compiler traces, torch's own operations do the same."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsiattn.attention.geometry import Tiles
from sparsiattn.kernels.native import build, ops
from sparsiattn.kernels.native.ops import native_top

CELLS = 64  # as in chunks.c


def serves(*tensors: Tensor) -> bool:
    """Whether compiled code may take these operands."""
    if torch.compiler.is_compiling() or not (build.is_loaded() or build.is_ready()):
        return False
    graded = torch.is_grad_enabled()
    for x in tensors:
        if not x.is_cpu or x.dtype is not torch.float32 or (graded and x.requires_grad):
            return False
    return True


def counts(q: Tensor, cells: int) -> bool:
    """Whether a kernel that counts the keys of so many cells itself is likely to come."""
    return cells <= CELLS and serves(q)


def top(scores: Tensor, count: int) -> Tensor:
    """Places of the best of each row, best first, ``[..., count]``."""
    if serves(scores):
        return native_top(scores, count)  # type: ignore[no-any-return]
    return scores.topk(count, dim=-1, sorted=True).indices


def held(groups: Tiles) -> Tensor | None:
    """How many slots of each group hold a token of their own; None where all do."""
    return None if groups.even else (groups.weight > 0).sum(-1)


def block_scores(
    q: Tensor, k: Tensor, tiles: Tiles, blocks: Tiles, tables: tuple[Tensor, Tensor],
    own: Tensor | None, shares: Tensor | None, prefix: int, scales: tuple[float, float],
    threshold: float, salience: bool, count: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`ConnectivityPlanner.scores` for tiles and blocks, ``[B, H, T, U]``, and the places of the
    ``count`` best of each row, as `top` gives them. tables: W_down and W_up; scales: of logits and
    of coefficients."""
    return ops.scores(
        q, k, tiles.order, held(tiles), blocks.order, held(blocks), *tables, own, shares, count,
        prefix, *scales, threshold, salience,
    )  # fmt: skip
