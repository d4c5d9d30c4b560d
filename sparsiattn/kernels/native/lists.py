"""Lists of the best keys in compiled code: from scores, and for tiles from votes."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sparsiattn.attention import geometry
from sparsiattn.attention.derivatives import is_unobserved
from sparsiattn.kernels.native import build, entries
from sparsiattn.kernels.native.ops import (
    FLOP_FORMULAS,
    KINDS,
    addresses_of,
    host_bias,
    host_width,
    parallel,
    whole_vectors,
    with_rows,
)
from sparsiattn.kernels.native.rows import (
    BEYOND,
    GROUP,
    parts_of,
    quantile_of,
    room_of,
    room_of_host,
)
from sparsiattn.kernels.native.scores import serves
from sparsiattn.kernels.workspace import SCRATCH

VOTER_GROUPS = 4
"""Groups of voters whose scores are computed together, where the keys do not fit into a cache."""
CACHED = 1 << 17
"""Numbers that fit into a thread's cache: 512 KiB of float32."""

_BEST_KEYS = "sparsiattn::native_best_keys"
torch.library.define(_BEST_KEYS, "(Tensor scores, int count, int prefix) -> Tensor")


@torch.library.impl(_BEST_KEYS, "CPU")
def _best_keys(scores: Tensor, count: int, prefix: int) -> Tensor:
    """The prefix and the best other columns of every row, in ascending order of columns.

    Args:
        scores: ``[B, H, R, Nk]`` float32; NaN counts as largest, and of equal scores the first
            columns are taken.
        count: Length of every list, more than ``prefix``.
        prefix: Number of leading columns, which are in every list.

    Returns:
        ``[B, H, R, count]``.
    """
    scores, columns = scores.contiguous(), scores.shape[-1]
    out = torch.empty(*scores.shape[:-1], count, dtype=torch.int64)
    if not out.numel():
        return out
    rows, threads, keep = scores.numel() // columns, torch.get_num_threads(), count - prefix
    room = 4 * whole_vectors(columns - prefix) + 3 * BEYOND
    scratch = SCRATCH.numbers("best", threads * room, scores)
    sizes = (rows, columns, prefix, keep, columns, threads, room)
    addresses = (*addresses_of(scores, out, scratch), parallel())
    quantile = quantile_of(keep, columns - prefix)
    build.code().best(entries.BEST_CALL.pack(*sizes, *addresses, quantile))
    return out


@torch.library.register_fake(_BEST_KEYS)  # type: ignore[untyped-decorator]
def _best_keys_shape(scores: Tensor, count: int, prefix: int) -> Tensor:
    return scores.new_empty(*scores.shape[:-1], count, dtype=torch.int64)


def best_keys(scores: Tensor, count: int, prefix: int) -> Tensor:
    """Lists of the prefix keys and the best other keys of every row, ``[..., count]``.

    Args:
        scores: ``[..., Nk]``.
        count: Length of a list, at least ``prefix`` and less than ``Nk``.
        prefix: Number of leading keys, which are in every list.
    """
    scores = scores.detach()  # the choice has no gradient
    if count > prefix and serves(scores):
        return torch.ops.sparsiattn.native_best_keys.default(scores, count, prefix)  # type: ignore[no-any-return]
    if prefix:
        is_prefix = geometry.table(_is_first, scores.shape[-1], prefix, device=scores.device)
        scores = scores.masked_fill(is_prefix, float("inf"))
    return scores.topk(count, dim=-1, sorted=False).indices


def _is_first(size: int, count: int, *, device: torch.device) -> Tensor:
    """``[size]``, True at the first ``count`` places."""
    return torch.arange(size, device=device) < count


_VOTED_KEYS = "sparsiattn::native_voted_keys"
torch.library.define(
    _VOTED_KEYS,
    "(Tensor q, Tensor k, Tensor order, Tensor held, int tiles, int count, int prefix, "
    "float scale, Tensor? bias=None, bool hard=False, int across=0) -> Tensor",
)


def _voted_keys(
    q: Tensor,
    k: Tensor,
    order: Tensor,
    held: Tensor,
    tiles: int,
    count: int,
    prefix: int,
    scale: float,
    bias: Tensor | None = None,
    hard: bool = False,
    across: int = 0,
) -> Tensor:
    """The keys that get the most attention from any voter of a tile.

    Args:
        q: Queries ``[B, H, N, D]`` float32.
        k: Keys ``[B, H, Nk, D]``, with the prefix.
        order: Patch queries of every voter, tile by tile, ``[T * m, s]``.
        held: How many of these are distinct, ``[T * m]``.
        tiles: Number of tiles, T.
        count: Length of every list, more than ``prefix``.
        prefix: Number of leading tokens, whose keys are in every list.
        scale: Factor of QK^T, above 0.
        bias: The host's bias, ``[B|1, H|1, N|1, Nk]``, additive or boolean, or its factors.
        hard: Whether the bias forbids keys, the same ones for every query of a head.
        across: Number of key columns if ``bias`` holds factors, as in `HostBias`.

    Returns:
        ``[B, H, T, count]``.
    """
    q, k = with_rows(q.float()), with_rows(k.float())
    (b, h, _, d), keys = q.shape, k.shape[-2]
    out = torch.empty(b, h, tiles, count, dtype=torch.int64)
    if not out.numel():
        return out
    fixed = whole_vectors(keys - prefix)
    columns, threads, keep = whole_vectors(fixed + prefix), torch.get_num_threads(), count - prefix
    groups = VOTER_GROUPS if columns * d > CACHED else 1
    room = room_of(columns, 0, d, 0) + (1 + groups * GROUP) * columns
    room += whole_vectors(groups * GROUP * d)
    host: tuple[int, ...] = (0, 0, 0, 0, 0, 0)
    if bias is not None:
        bias = host_bias(bias, (b, h, q.shape[-2], host_width(keys, across)))
        hard = hard or bias.dtype is torch.bool
        host = (KINDS[bias.dtype], *bias.stride()[:3], hard, across)
        room += room_of_host(columns, fixed, 0, d, 0, 0, True, 0)
    scratch = SCRATCH.numbers("votes", threads * room, q)
    voters = order.shape[0] // tiles
    sizes = (b, h, keys, d, prefix, keep, columns, fixed, tiles, voters, order.shape[1])
    work = (threads, parts_of(b * h, tiles * voters, threads), room, groups, *host)
    addresses = (*addresses_of(q, k, order, held, out, bias, scratch), parallel())
    options = (scale, quantile_of(keep, keys - prefix))
    steps = (*q.stride()[:3], *k.stride()[:3])
    build.code().votes(entries.VOTES_CALL.pack(*sizes, *steps, *work, *addresses, *options))
    return out


torch.library.impl(_VOTED_KEYS, "CPU", _voted_keys)


@torch.library.register_fake(_VOTED_KEYS)  # type: ignore[untyped-decorator]
def _voted_keys_shape(
    q: Tensor, k: Tensor, order: Tensor, held: Tensor, tiles: int, count: int, *others: object
) -> Tensor:
    return q.new_empty(*q.shape[:2], tiles, count, dtype=torch.int64)


def _votes_flops(q_shape: Any, k_shape: Any, order: Any, *others: Any, **options: Any) -> int:
    """FLOPs of the voters' logits."""
    return int(2 * math.prod(k_shape) * order[0])


FLOP_FORMULAS[torch.ops.sparsiattn.native_voted_keys] = _votes_flops


def voted_keys(q: Tensor, k: Tensor, *others: Any) -> Tensor:
    """The operator ``native_voted_keys``, called directly where nothing observes operators."""
    operator = torch.ops.sparsiattn.native_voted_keys.default
    call = _voted_keys if is_unobserved(q, k) and not q.is_meta else operator
    return call(q, k, *others)
