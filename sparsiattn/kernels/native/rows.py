"""Attention of every query to its own best keys in one call of compiled code."""

from __future__ import annotations

import math
from statistics import NormalDist

import torch
from torch import Tensor

from sparsiattn.attention.derivatives import is_transformed, is_unobserved
from sparsiattn.attention.inputs import AttentionInputs
from sparsiattn.kernels.compiled import is_loaded
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
from sparsiattn.kernels.workspace import SCRATCH

GROUP, VIEWS = 6, 8  # as in rows.c
BEYOND = 32  # numbers written past the end of a list
# queries of an item of work, at least: each packs the keys of its head anew
ROWS_OF_PART = 48


def serves(inputs: AttentionInputs) -> bool:
    """Whether compiled code takes a call, so that nobody needs lists of its keys."""
    operands = (inputs.q, inputs.k, inputs.v, inputs.bias)
    wants_gradient = any(x is not None and x.requires_grad for x in operands)
    return plans(inputs) and not (torch.is_grad_enabled() and wants_gradient)


def plans(inputs: AttentionInputs) -> bool:
    """Whether compiled code may choose the keys of a call, which takes no gradient."""
    q, k, v = inputs.q, inputs.k, inputs.v
    if torch.compiler.is_compiling() or is_transformed():
        return False
    if inputs.dropout or not inputs.scale > 0:
        return False
    if inputs.device.type != "cpu" or not (is_loaded() or build.is_ready()):
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
        q: Queries ``[B, H, N, D]`` of a type of `FLOATS` and of any strides.
        k: Keys ``[B, H, Nk, D]``, with the prefix.
        v: Values ``[B, H, Nk, Dv]``.
        cells: The summary's cell of every key, ``[Nk]``, G for prefix keys; None without one.
        count: Keys of the summary, G; 0 without one.
        keep: Patch keys of every list; of equal logits the first keys are taken.
        prefix: Leading keys that are in every list.
        first: Leading queries, which see every key and no summary.
        scale: Factor of QK^T, above 0.
        bias: The host's, ``[B|1, H|1, N|1, Nk]``, additive or boolean, or its factors.
        hard: Whether the bias forbids keys, so that no cell stands for those.
        across: As in `HostBias`.

    Returns:
        ``[B, H, N, Dv]``, in the type of the operands.
    """
    q, k, v, cells = with_rows(q), with_rows(k), with_rows(v), contiguous(cells)
    (b, h, n, d), keys, width = q.shape, k.shape[-2], v.shape[-1]
    # [B, N, H, Dv] in memory, which the host's reshape need not copy
    out = torch.empty_strided((b, h, n, width), (n * h * width, width, h * width, 1), dtype=q.dtype)
    if not out.numel():
        return out
    fixed = whole_vectors(keys - prefix)
    columns = whole_vectors(fixed + prefix + count)
    host: tuple[int, ...] = (0, 0, 0, 0, 0, 0, 0)
    if bias is not None:
        bias = host_bias(bias, (b, h, n, host_width(keys, across)))
        hard = hard or bias.dtype is torch.bool
        views = VIEWS if hard and count and bias.stride(2) else 0
        host = (KINDS[bias.dtype], *bias.stride()[:3], hard, views, across)
    threads, kind = torch.get_num_threads(), KINDS[q.dtype]
    room = room_of(columns, count, d, width)
    if kind or bias is not None:
        room += room_of_host(columns, fixed, count, d, width, kind, bias is not None, host[5])
    scratch = SCRATCH.room_for("rows", threads * room)
    sizes = (b, h, n, keys, d, width, first, prefix, keep, count, columns, fixed)
    steps = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3])
    work = (threads, parts_of(b * h, n, threads), room, kind, *host)
    addresses = (*addresses_of(q, k, v, out, cells, bias, scratch), parallel())
    options = (scale, quantile_of(keep, keys - prefix))
    build.code().rows(entries.ROWS_CALL.pack(*sizes, *steps, *work, *addresses, *options))
    return out


torch.library.impl(_BEST, "CPU", _attend_to_best)


@torch.library.register_fake(_BEST)  # type: ignore[untyped-decorator]
def _best_shape(q: Tensor, k: Tensor, v: Tensor, *others: object) -> Tensor:
    b, h, n, _ = q.shape
    return q.new_empty(b, n, h, v.shape[-1]).transpose(1, 2)


def attend_to_best(
    q: Tensor, k: Tensor, v: Tensor, *others: object, unobserved: bool = False
) -> Tensor:
    """As the operator ``native_attend_to_best``; ``unobserved`` where `is_unobserved` was asked."""
    if unobserved or (type(v) is Tensor and is_unobserved(q, k)):
        return _attend_to_best(q, k, v, *others)  # type: ignore[arg-type]
    return torch.ops.sparsiattn.native_attend_to_best.default(q, k, v, *others)  # type: ignore[no-any-return]


def room_of(columns: int, count: int, dim: int, width: int) -> int:
    """Numbers that a thread needs, as `rows_room` in rows.c divides them."""
    cells = whole_vectors(count)
    packed = -(-columns // SPAN) * SPAN * dim + columns * width
    lists = (2 + 2 * GROUP) * (columns + BEYOND)
    return whole_vectors(packed + GROUP * columns + lists + cells * (dim + 1 + 2 * GROUP))


def room_of_host(
    columns: int, fixed: int, count: int, dim: int, width: int, kind: int, biased: bool, views: int
) -> int:
    """What a thread needs beside `room_of` for other types and for the host's bias."""
    rows = SPAN * (max(dim, width) + 16) if kind else 0
    host = GROUP * columns + (1 + BAND_NUMBERS) * fixed  # bias, what is seen, bands
    each = whole_vectors(count) * (dim + 1) + count * width + fixed
    return whole_vectors(rows + (biased * host) + views * each)


def parts_of(heads: int, queries: int, threads: int) -> int:
    """Parts into which the queries of each head are split, so that no thread waits long."""
    if heads % threads == 0 or heads >= 8 * threads:
        return 1
    return max(1, min(math.ceil(8 * threads / heads), queries // ROWS_OF_PART))


def quantile_of(keep: int, keys: int) -> float:
    """The threshold of the best of normal numbers, in deviations: where the search begins."""
    return NormalDist().inv_cdf(min(max(1 - keep / keys, 1e-6), 1 - 1e-6))
