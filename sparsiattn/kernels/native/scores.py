"""Planning in compiled code.

It decides over small sites, where torch's calls cost more than the arithmetic. Only where the
`native` kernel was compiled before, in float32 on a CPU without a gradient. Elsewhere, and in
programs that are exported, torch's own operations do the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsiattn.attention.derivatives import is_exporting, is_transformed
from sparsiattn.attention.geometry import Tiles
from sparsiattn.kernels.compiled import is_loaded
from sparsiattn.kernels.native import build, ops

CELLS = 144  # as in chunks.c


def serves(*tensors: Tensor) -> bool:
    """Whether compiled code may take these operands."""
    return _serves(tensors, torch.float32)


def is_ready() -> bool:
    """Whether there is compiled code, which also those find who run what is traced now.

    `torch.compile` keeps its operators in the program. An exported program runs elsewhere.
    """
    if torch.compiler.is_compiling():  # a traced program cannot look for files
        return is_loaded() and not is_exporting()
    return (is_loaded() or build.is_ready()) and not is_transformed()


def _serves(tensors: tuple[Tensor, ...], dtype: torch.dtype) -> bool:
    if not is_ready():
        return False
    grad_mode = torch.is_grad_enabled()
    for x in tensors:
        if not x.is_cpu or x.dtype is not dtype or (grad_mode and x.requires_grad):
            return False
    return True


def counts(q: Tensor, cells: int, device: torch.device) -> bool:
    """Whether a kernel that counts the keys of so many cells itself is likely to come.

    Args:
        q: The queries.
        cells: Keys of the summary.
        device: Where the call runs; in a dry run, where it would.
    """
    if cells > CELLS or q.dtype not in ops.FLOATS:
        return False
    dry = q.is_meta and device.type == "cpu"
    return is_ready() if dry else _serves((q,), q.dtype)


def top(scores: Tensor, count: int) -> Tensor:
    """Places of the best of each row, best first, ``[..., count]``."""
    if serves(scores):
        return ops.native_top(scores, count)  # type: ignore[no-any-return]
    return scores.topk(count, dim=-1, sorted=True).indices


def group_sizes(groups: Tiles) -> Tensor | None:
    """How many slots of each group hold a token of their own; None where all do."""
    return None if groups.even else (groups.weight > 0).sum(-1)


def block_scores(
    q: Tensor,
    k: Tensor,
    tiles: Tiles,
    blocks: Tiles,
    tables: tuple[Tensor, Tensor],
    own: Tensor | None,
    shares: Tensor | None,
    prefix: int,
    scales: tuple[float, float],
    threshold: float,
    salience: bool,
    count: int,
) -> tuple[Tensor, Tensor]:
    """`ConnectivityPlanner.scores` for tiles and blocks, and the best of each row.

    Args:
        q: Queries ``[B, H, N, D]``.
        k: Keys ``[B, H, Nk, D]``.
        tiles: The tiles of queries.
        blocks: The blocks of keys.
        tables: W_down and W_up, ``[P + U, K]`` each.
        own: ``[1]``, the factor of ``shares``; None for none.
        shares: ``[T, U]``, the share of each tile's queries in each block.
        prefix: Leading tokens that are not patches.
        scales: Of logits and of coefficients.
        threshold: Entries of abs(W_up) up to it count as zero.
        salience: Whether what the mean query sees of a block raises its scores.
        count: Blocks to choose.

    Returns:
        Scores ``[B, H, T, U]`` and the places of the ``count`` best of each row, as `top` gives
        them.
    """
    groups = (tiles.order, group_sizes(tiles), blocks.order, group_sizes(blocks))
    options = (own, shares, count, prefix, *scales, threshold, salience)
    return ops.scores(q, k, *groups, *tables, *options)
