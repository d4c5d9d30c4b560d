"""Planning in compiled code.

It matters at small sites, where torch's calls cost more than the arithmetic. It runs only if the
`native` kernel is compiled, in float32 on a CPU without gradients. Otherwise, and in exported
programs, torch's own operations compute the same.
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
    """Whether compiled code takes these operands: float32 on a CPU, without gradients."""
    return _serves(tensors, torch.float32)


def is_ready() -> bool:
    """Whether compiled code is available now and in the program that is being traced, if any.

    A program of `torch.compile` runs in this process; an exported program runs elsewhere.
    """
    if torch.compiler.is_compiling():  # a traced program cannot search for files
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
    """Whether the call will probably use a kernel that counts the keys of each cell itself.

    Args:
        q: The queries.
        cells: Number of cells of the summary.
        device: Device of the call; in a dry run, the device that it would run on.
    """
    if cells > CELLS or q.dtype not in ops.FLOATS:
        return False
    dry = q.is_meta and device.type == "cpu"
    return is_ready() if dry else _serves((q,), q.dtype)


def top(scores: Tensor, count: int) -> Tensor:
    """Indices of the best scores of each row, best first, ``[..., count]``."""
    if serves(scores):
        return ops.native_top(scores, count)  # type: ignore[no-any-return]
    return scores.topk(count, dim=-1, sorted=True).indices


def group_sizes(groups: Tiles) -> Tensor | None:
    """Number of distinct tokens in each group; None if no slot repeats a token."""
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
    """`ConnectivityPlanner.scores` for tiles and blocks, and the best blocks of each row.

    Args:
        q: Queries ``[B, H, N, D]``.
        k: Keys ``[B, H, Nk, D]``.
        tiles: The tiles of queries.
        blocks: The blocks of keys.
        tables: W_down and W_up, ``[P + U, K]`` each.
        own: ``[1]``, the factor of ``shares``; None for no such term.
        shares: ``[T, U]``, the share of each tile's queries in each block.
        prefix: Number of leading tokens that are not patches.
        scales: Factors of logits and of coefficients.
        threshold: Entries of abs(W_up) of at most this value count as zero.
        salience: Whether the attention of the mean query to a block raises the block's scores.
        count: Number of blocks to choose.

    Returns:
        Scores ``[B, H, T, U]`` and the indices of the ``count`` best blocks of each row, as from
        `top`.
    """
    groups = (tiles.order, group_sizes(tiles), blocks.order, group_sizes(blocks))
    options = (own, shares, count, prefix, *scales, threshold, salience)
    return ops.scores(q, k, *groups, *tables, *options)
