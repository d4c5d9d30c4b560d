"""Attention of every query to its own best keys in one call of compiled code."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from sparsiattn.attention.derivatives import is_unobserved
from sparsiattn.attention.inputs import AttentionInputs
from sparsiattn.kernels.native import build, entries
from sparsiattn.kernels.native.ops import (
    BAND_NUMBERS,
    FLOATS,
    KINDS,
    SPAN,
    addresses_of,
    contiguous,
    host_bias,
    host_width,
    parallel,
    whole_vectors,
    with_rows,
)
from sparsiattn.kernels.native.scores import is_ready
from sparsiattn.kernels.workspace import SCRATCH

Attend: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Attention of q, k and v."""

GROUP, VIEWS = 6, 8  # as in rows.c
NO_HOST = (0, 0, 0, 0, 0, 0, 0)
"""Type, strides and options of the host's bias in a call without one."""
BEYOND = 32  # numbers written past the end of a list
# fewest queries of an item of work, since each item packs the keys of its head again
ROWS_OF_PART = 48


def serves(inputs: AttentionInputs) -> bool:
    """Whether compiled code computes a call without making key lists."""
    operands = (inputs.q, inputs.k, inputs.v, inputs.bias)
    wants_gradient = any(x is not None and x.requires_grad for x in operands)
    return plans(inputs) and not (torch.is_grad_enabled() and wants_gradient)


def plans(inputs: AttentionInputs) -> bool:
    """Whether compiled code can choose the keys of a call; the choice needs no gradient."""
    q, k, v = inputs.q, inputs.k, inputs.v
    if inputs.dropout or not inputs.scale > 0:
        return False
    if inputs.device.type != "cpu" or not is_ready():
        return False
    return q.dtype in FLOATS and k.dtype is q.dtype and v.dtype is q.dtype


_BEST = "sparsiattn::native_attend_to_best"
torch.library.define(
    _BEST,
    "(Tensor q, Tensor k, Tensor v, Tensor? cells, int count, int keep, int prefix, int first, "
    "float scale, Tensor? bias=None, bool hard=False, int across=0) -> Tensor",
)


def _attend_to_best(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cells: Tensor | None,
    count: int,
    keep: int,
    prefix: int,
    first: int,
    scale: float,
    bias: Tensor | None = None,
    hard: bool = False,
    across: int = 0,
) -> Tensor:
    """Attention of every query to prefix keys, its best patch keys and the summary of the others.

    Args:
        q: Queries ``[B, H, N, D]`` of a dtype in `FLOATS` and of any strides.
        k: Keys ``[B, H, Nk, D]``, with the prefix.
        v: Values ``[B, H, Nk, Dv]``.
        cells: The summary's cell of every key, ``[Nk]``, G for prefix keys; None without a
            summary.
        count: Number of summary keys, G; 0 without a summary.
        keep: Number of patch keys of every list; of equal logits the first keys are taken.
        prefix: Number of leading keys, which are in every list.
        first: Number of leading queries, which attend to every key and to no summary.
        scale: Factor of QK^T, above 0.
        bias: The host's bias, ``[B|1, H|1, N|1, Nk]``, additive or boolean, or its factors.
        hard: Whether the bias forbids keys, so that no cell stands for those.
        across: Number of key columns if ``bias`` holds factors, as in `HostBias`.

    Returns:
        ``[B, H, N, Dv]``, in the dtype of the operands.
    """
    q, k, v, cells = with_rows(q), with_rows(k), with_rows(v), contiguous(cells)
    (b, h, n, _), keys = q.shape, k.shape[-2]
    host: tuple[int, ...] = NO_HOST
    if bias is not None:
        bias = host_bias(bias, (b, h, n, host_width(keys, across)))
        hard = hard or bias.dtype is torch.bool
        views = VIEWS if hard and count and bias.stride(2) else 0
        host = (KINDS[bias.dtype], *bias.stride()[:3], hard, views, across)
    call = rows_call(q, k, v, (first, prefix, keep, count), scale, host, biased=bias is not None)
    return call.attend(q, k, v, cells, bias)


class RowsCall(NamedTuple):
    """A packed call without its addresses, valid for all operands of the same layout.

    Attributes:
        shape: Shape of the output, ``[B, H, N, Dv]``.
        strides: Strides of the output.
        dtype: Dtype of the output.
        threads: Number of torch's threads.
        room: Size of the memory for all threads, in floats.
        head: Part of `entries.ROWS_CALL` before the addresses.
        tail: Part of `entries.ROWS_CALL` after the addresses.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    threads: int
    room: int
    head: bytes
    tail: bytes

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, cells: Tensor | None, bias: Tensor | None = None
    ) -> Tensor:
        """Run the call on these operands, ``[B, H, N, Dv]``."""
        out = torch.empty_strided(self.shape, self.strides, dtype=self.dtype)
        if out.numel():
            scratch = SCRATCH.room_for("rows", self.room)
            addresses = addresses_of(q, k, v, out, cells, bias, scratch)
            packed = entries.ROWS_ADDRESSES.pack(*addresses, parallel())
            build.code().rows(self.head + packed + self.tail)
        return out


def rows_call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    counts: tuple[int, int, int, int],
    scale: float,
    host: tuple[int, ...],
    *,
    biased: bool,
) -> RowsCall:
    """Pack a call of `_attend_to_best`; its operands must have contiguous rows.

    Args:
        q: Queries ``[B, H, N, D]``.
        k: Keys ``[B, H, Nk, D]``.
        v: Values ``[B, H, Nk, Dv]``.
        counts: ``first``, ``prefix``, ``keep`` and ``count`` of `_attend_to_best`.
        scale: Factor of QK^T.
        host: Type, strides and options of the host's bias, or `NO_HOST`.
        biased: Whether the host has a bias.
    """
    (b, h, n, d), keys, width = q.shape, k.shape[-2], v.shape[-1]
    _, prefix, keep, count = counts
    # [B, N, H, Dv] in memory, so that the host's reshape copies nothing
    strides = (n * h * width, width, h * width, 1)
    fixed = whole_vectors(keys - prefix)
    columns = whole_vectors(fixed + prefix + count)
    threads, kind = torch.get_num_threads(), KINDS[q.dtype]
    room = room_of(columns, count, d, width)
    if kind or biased:
        room += room_of_host(columns, fixed, count, d, width, kind, biased, host[5])
    sizes = (b, h, n, keys, d, width, *counts, columns, fixed)
    steps = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *strides[:3])
    work = (threads, parts_of(b * h, n, threads), room, kind, *host)
    head = entries.ROWS_HEAD.pack(*sizes, *steps, *work)
    tail = entries.ROWS_TAIL.pack(scale, quantile_of(keep, keys - prefix))
    return RowsCall((b, h, n, width), strides, q.dtype, threads, threads * room, head, tail)


def repeat_best(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> Attend:
    """`attend_to_best` for operands of this layout, called directly and not as an operator.

    Args:
        q: Queries ``[B, H, N, D]``.
        k: Keys ``[B, H, Nk, D]``.
        v: Values ``[B, H, Nk, Dv]``.
        *options: The other arguments of `attend_to_best`, without a bias.
    """
    cells, count, keep, prefix, first, scale = options
    if not all(x is with_rows(x) for x in (q, k, v)):
        return lambda q, k, v: _attend_to_best(q, k, v, *options)
    cells = contiguous(cells)
    call = rows_call(q, k, v, (first, prefix, keep, count), scale, NO_HOST, biased=False)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if torch.get_num_threads() != call.threads:
            return _attend_to_best(q, k, v, *options)
        return call.attend(q, k, v, cells)

    return attend


torch.library.impl(_BEST, "CPU", _attend_to_best)


@torch.library.register_fake(_BEST)  # type: ignore[untyped-decorator]
def _best_shape(q: Tensor, k: Tensor, v: Tensor, *others: object) -> Tensor:
    b, h, n, _ = q.shape
    return q.new_empty(b, n, h, v.shape[-1]).transpose(1, 2)


def attend_to_best(q: Tensor, k: Tensor, v: Tensor, *others: object) -> Tensor:
    """The operator ``native_attend_to_best``, called directly where nothing observes operators."""
    if type(v) is Tensor and is_unobserved(q, k):
        return _attend_to_best(q, k, v, *others)  # type: ignore[arg-type]
    return torch.ops.sparsiattn.native_attend_to_best.default(q, k, v, *others)  # type: ignore[no-any-return]


def room_of(columns: int, count: int, dim: int, width: int) -> int:
    """Size of a thread's memory in floats, which `rows_room` in rows.c divides."""
    cells = whole_vectors(count)
    packed = -(-columns // SPAN) * SPAN * dim + columns * width
    lists = (2 + 2 * GROUP) * (columns + BEYOND)
    return whole_vectors(packed + GROUP * columns + lists + cells * (dim + 1 + 2 * GROUP))


def room_of_host(
    columns: int, fixed: int, count: int, dim: int, width: int, kind: int, biased: bool, views: int
) -> int:
    """Further memory of a thread, for dtypes other than float32 and for the host's bias."""
    rows = SPAN * (max(dim, width) + 16) if kind else 0
    host = GROUP * columns + (1 + BAND_NUMBERS) * fixed  # bias, visible keys, bands
    each = whole_vectors(count) * (dim + 1) + count * width + fixed
    return whole_vectors(rows + (biased * host) + views * each)


def parts_of(heads: int, queries: int, threads: int) -> int:
    """Number of parts into which the queries of each head are split, to balance the threads."""
    if heads % threads == 0 or heads >= 8 * threads:
        return 1
    return max(1, min(math.ceil(8 * threads / heads), queries // ROWS_OF_PART))


def quantile_of(keep: int, keys: int) -> float:
    """First threshold of the search, in standard deviations above the mean.

    It assumes normally distributed scores.
    """
    return NormalDist().inv_cdf(min(max(1 - keep / keys, 1e-6), 1 - 1e-6))
