"""Operators of torch around the kernels that plan: `pool`, `vote` and `rank`.

Importing this module does not import triton.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsiattn.kernels._triton.visible import show_kernels
from sparsiattn.kernels.native.ops import FLOP_FORMULAS

MOST_VOTES = 1 << 26
"""Votes that exist at once: 256 MiB of float32."""

_POOL = (
    "(Tensor k, Tensor v, Tensor cells, Tensor members, Tensor sizes, Tensor? allowed) "
    "-> (Tensor, Tensor)"
)
_VOTED = (
    "(Tensor q, Tensor k, Tensor order, Tensor held, SymInt tiles, SymInt count, SymInt prefix, "
    "float scale, Tensor? cells, Tensor? total) -> (Tensor, Tensor)"
)


def _pool_cells(
    k: Tensor, v: Tensor, cells: Tensor, members: Tensor, sizes: Tensor, allowed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Means of keys and of values over cells, in the dtype of the operands.

    Args:
        k: Keys ``[B, H, Nk, D]``.
        v: Values ``[B, H, Nk, Dv]``.
        cells: Cell of every key, ``[Nk]``; at least G for keys that belong to none.
        members: The keys of every cell, ``[G, s]``.
        sizes: How many of these each cell has, ``[G]``.
        allowed: Keys that may enter a mean, boolean ``[B|1, H|1, Nk]``; None for all.

    Returns:
        ``[B, H, G, D]`` and ``[B, H, G, Dv]``, zero for cells without any key.
    """
    from sparsiattn.kernels._triton import pool

    k, v = _with_rows(k), _with_rows(v)
    means = _means_of(k, v, members)
    pool.launch(k, v, members, sizes, allowed, *means).run(k.device)
    return means


pool_cells = torch.library.custom_op(
    "sparsiattn::pool_cells", _pool_cells, mutates_args=(), schema=_POOL
)
show_kernels(pool_cells, _pool_cells)


@pool_cells.register_fake
def _(k: Tensor, v: Tensor, _: Tensor, members: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    return _means_of(k, v, members)


def _means_of(k: Tensor, v: Tensor, members: Tensor) -> tuple[Tensor, Tensor]:
    shape = (*k.shape[:2], members.shape[0])
    return k.new_empty(*shape, k.shape[-1]), v.new_empty(*shape, v.shape[-1])


def _save_pooled(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, _, cells, _, sizes, allowed = inputs
    ctx.save_for_backward(cells, sizes, allowed)
    ctx.set_materialize_grads(False)


def _pooled_gradients(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    cells, sizes, allowed = ctx.saved_tensors
    if allowed is None:
        counts = sizes[:, None]
    else:  # not in the forward pass, which does not need them
        member = cells[:, None] == torch.arange(sizes.shape[0], device=cells.device)
        counts = (allowed.float() @ member.float()).unsqueeze(-1).clamp_min(1.0)
    to_k, to_v = (None if x is None else _spread(x / counts, cells, allowed, x) for x in grads)
    return to_k, to_v, None, None, None, None


def _spread(shares: Tensor, cells: Tensor, allowed: Tensor | None, like: Tensor) -> Tensor:
    """Rows of cells ``[B, H, G, D]`` to the keys of each, ``[B, H, Nk, D]``; 0 for other keys."""
    rows = F.pad(shares, (0, 0, 0, 1)).to(like.dtype)
    spread = rows.index_select(-2, cells.clamp_max(shares.shape[-2]))
    return spread if allowed is None else spread * allowed.unsqueeze(-1).to(like.dtype)


pool_cells.register_autograd(_pooled_gradients, setup_context=_save_pooled)


def _voted_keys(
    q: Tensor,
    k: Tensor,
    order: Tensor,
    held: Tensor,
    tiles: int,
    count: int,
    prefix: int,
    scale: float,
    cells: Tensor | None,
    total: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The keys that get the most attention from any voter of a tile; see `TopLogits`.

    Args:
        q: Queries ``[B, H, N, D]``.
        k: Keys ``[B, H, Nk, D]``, with the prefix.
        order: Patch queries of every voter, tile by tile, ``[T * m, s]``.
        held: How many of these are distinct, ``[T * m]``.
        tiles: Number of tiles, T.
        count: Length of every list, more than ``prefix``.
        prefix: Number of leading tokens, whose keys are in every list.
        scale: Factor of QK^T.
        cells: Cell of every key, ``[Nk]``; None without a summary.
        total: Number of keys of every cell, that of the prefix last, ``[G + 1]``.

    Returns:
        The lists in ascending order, ``[B, H, T, count]``, and the log of how many keys of each
        cell a list leaves out, ``[B, H, T, G]``; an empty tensor without a summary.
    """
    from sparsiattn.kernels._triton import score

    q, k = _with_rows(q), _with_rows(k)
    index, bias = _lists_of(q, tiles, count, total)
    # rows of votes that start at multiples of 64 bytes
    columns = -(-k.shape[-2] // 16) * 16
    for part in _parts(q, tiles * columns):
        mine, keys = q[part], k[part]
        votes = q.new_empty(*mine.shape[:2], tiles, columns, dtype=torch.float32)
        score.vote_launch(mine, keys, order, held, votes, prefix, scale).run(q.device)
        logs = bias[part] if total is not None else None
        lists = votes, index[part], prefix, k.shape[-2]
        score.rank_launch(*lists, cells, total, logs).run(q.device)
    return index, bias


voted_keys = torch.library.custom_op(
    "sparsiattn::voted_keys", _voted_keys, mutates_args=(), schema=_VOTED
)
show_kernels(voted_keys, _voted_keys)


def _parts(q: Tensor, votes: int) -> Iterator[tuple[slice, slice]]:
    """Slices over images and heads, each contiguous in a result and of few votes.

    Args:
        q: Queries ``[B, H, N, D]``.
        votes: Number of votes of one head.
    """
    batch, heads = q.shape[:2]
    step = max(1, MOST_VOTES // max(1, votes))
    images, at_once = max(1, step // max(1, heads)), min(heads, step)
    for image in range(0, batch, images):
        for head in range(0, heads, at_once):
            yield slice(image, image + images), slice(head, head + at_once)


@voted_keys.register_fake
def _(q: Tensor, _: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    _, _, tiles, count, _, _, _, total = others
    return _lists_of(q, tiles, count, total)


def _lists_of(q: Tensor, tiles: int, count: int, total: Tensor | None) -> tuple[Tensor, Tensor]:
    shape = (*q.shape[:2], tiles)
    index = q.new_empty(*shape, count, dtype=torch.int64)
    if total is None:
        return index, q.new_empty(0, dtype=torch.float32)
    return index, q.new_empty(*shape, total.shape[0] - 1, dtype=torch.float32)


def _voted_flops(q_shape: Any, k_shape: Any, order: Any, *others: Any, **options: Any) -> int:
    """FLOPs of the voters' logits."""
    return int(2 * math.prod(k_shape) * order[0])


FLOP_FORMULAS[torch.ops.sparsiattn.voted_keys] = _voted_flops


def _with_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
