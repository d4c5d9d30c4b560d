"""The compiled code as torch operators, opaque to torch's compiler; forward only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparsiattn.attention.derivatives import is_unobserved
from sparsiattn.kernels.native import build, entries
from sparsiattn.kernels.workspace import SCRATCH

# as in vectors.h
SPAN = 64
BAND_NUMBERS = 6  # numbers per patch, which `find_bands` in bands.h divides
# approximate memory, in floats, of the images that are planned at once
PLANNED_AT_ONCE = 1 << 21
# a larger workspace is not kept: using it takes longer than allocating it
PLAN_KEPT = 1 << 20


def parallel() -> int:
    """Address of the function that runs a region of compiled code in torch's own threads.

    It is 0 if there is none; calls then run in one thread.
    """
    return build.code().parallel


# Operators are defined without `torch.library.custom_op`, whose Python code costs as much as a
# small call. Exported programs store the names of arguments, so these must not change.
_ATTENTION = "sparsiattn::native_attention"
torch.library.define(
    _ATTENTION,
    "(Tensor q, Tensor k, Tensor v, Tensor chosen, Tensor? table, Tensor? held, Tensor? order, "
    "Tensor? cells, Tensor? bias, int count, int listed, int prefix, int first, float scale, "
    "Tensor? host=None, bool hard=False, int across=0) -> Tensor",
)


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chosen: Tensor,
    table: Tensor | None,
    held: Tensor | None,
    order: Tensor | None,
    cells: Tensor | None,
    bias: Tensor | None,
    count: int,
    listed: int,
    prefix: int,
    first: int,
    scale: float,
    host: Tensor | None = None,
    hard: bool = False,
    across: int = 0,
) -> Tensor:
    """Attention of query tiles to their key lists.

    Args:
        q: Queries ``[B, H, first + n, D]`` of any strides.
        k: Keys ``[B, H, Nk, D]``, with the prefix.
        v: Values ``[B, H, Nk, Dv]``.
        chosen: Keys, or blocks of ``table``, of every tile, ``[B|1, H|1, T, C]``.
        table: Patch keys of every block, ``[U, g]``; lists then start with the prefix. None for
            lists of single keys.
        held: Number of distinct keys of each block, ``[U]``; None if all are.
        order: Patch queries of every tile, ``[T, t]``; None if each query has its own list.
        cells: The summary's cell of every key, ``[Nk]``; G for keys without a cell.
        bias: Logits of the summary, ``[B|1, H|1, T or n, G]``; None for the log of how many of a
            cell's keys a list leaves out.
        count: Number of summary keys, G; 0 without a summary.
        listed: Length of every list.
        prefix: Number of leading keys at the start of every list of blocks.
        first: Number of leading queries, which attend to every key.
        scale: Factor of QK^T.
        host: The host's bias, ``[B|1, H|1, N|1, Nk]``, additive or boolean, or its factors.
        hard: Whether it forbids keys; with a summary, the same keys for every query of a head.
        across: Number of key columns if ``host`` holds factors, as in `HostBias`.

    Returns:
        ``[B, H, first + n, Dv]``, in the dtype of the operands.
    """
    dtype, n = q.dtype, q.shape[-2]
    # a tile reads its keys many times, so converting them once is cheaper than at every read
    q, k, v = (with_rows(x.float()) for x in (q, k, v))
    b, h, width = *q.shape[:2], v.shape[-1]
    # [B, N, H, Dv] in memory, so that the host's reshape copies nothing
    strides = (n * h * width, width, h * width, 1)
    out = torch.empty_strided((b, h, n, width), strides, dtype=q.dtype)
    lists = (chosen, table, held, order, cells, bias)
    options = (count, listed, prefix, first, scale)
    packed, _kept = attention_call(q, k, v, out, *lists, *options, host, hard, across)
    build.code().attend(packed)
    return out.to(dtype)


def attention_call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    chosen: Tensor,
    table: Tensor | None,
    held: Tensor | None,
    order: Tensor | None,
    cells: Tensor | None,
    bias: Tensor | None,
    count: int,
    listed: int,
    prefix: int,
    first: int,
    scale: float,
    host: Tensor | None,
    hard: bool,
    across: int = 0,
) -> tuple[bytes, list[Tensor | None]]:
    """A packed `ATTEND_CALL`, and the tensors that must stay alive until the call ends.

    Arguments as in `_attention`; ``out`` receives the result.
    """
    chosen = chosen.contiguous()
    bias = None if bias is None else bias.to(torch.float32)
    optional = [contiguous(x) for x in (table, held, order, cells, bias)]
    (b, h, n, d), width = q.shape, v.shape[-1]
    # `head_of` in attention.c divides this memory
    room = b * h * (whole_vectors(count * (d + width + 1)) + 16)
    host_options: tuple[int, ...] = (0, 0, 0, 0, 0, 0)
    if host is not None:
        exact = host if host.dtype in (torch.float32, torch.bool) else host.float()
        host = host_bias(exact, (b, h, n, host_width(k.shape[-2], across)))
        hard = hard or host.dtype is torch.bool
        host_options = (KINDS[host.dtype], *host.stride()[:3], hard, across)
        room += BAND_NUMBERS * k.shape[-2]
    pooled = SCRATCH.numbers("pooled", room, q)
    tiles, slots = chosen.shape[-2], 1 if order is None else order.shape[1]
    sizes = (b, h, k.shape[-2], d, width, first, tiles, slots)
    unit = 0 if table is None else table.shape[1]
    lists = (chosen.shape[-1], *_lead_strides(chosen), unit, listed, prefix)
    counted, by_tile = count > 0 and bias is None, bias is not None and bias.shape[-2] == tiles
    summary = (count, counted, by_tile, *_lead_strides(bias))
    steps = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3])
    tensors = [q, k, v, out, chosen, *optional, pooled, host]
    numbers = (*sizes, *lists, *summary, *steps, torch.get_num_threads(), *host_options)
    addresses = (*addresses_of(*tensors), parallel())
    return entries.ATTEND_CALL.pack(*numbers, *addresses, scale), tensors


torch.library.impl(_ATTENTION, "CPU", _attention)


@torch.library.register_fake(_ATTENTION)  # type: ignore[untyped-decorator]
def _attention_shape(q: Tensor, k: Tensor, v: Tensor, *others: object) -> Tensor:
    b, h, n, _ = q.shape
    # laid out as by torch's own attention, so that the host's reshape copies nothing
    return q.new_empty(b, n, h, v.shape[-1]).transpose(1, 2)


_SCORES = "sparsiattn::native_scores"
torch.library.define(
    _SCORES,
    "(Tensor q, Tensor k, Tensor order, Tensor? held, Tensor block_order, Tensor? block_held, "
    "Tensor down, Tensor up, Tensor? own, Tensor? shares, int count, int prefix, float scale, "
    "float basis_scale, float threshold, bool salience) -> (Tensor, Tensor)",
)


def _scores(
    q: Tensor,
    k: Tensor,
    order: Tensor,
    held: Tensor | None,
    block_order: Tensor,
    block_held: Tensor | None,
    down: Tensor,
    up: Tensor,
    own: Tensor | None,
    shares: Tensor | None,
    count: int,
    prefix: int,
    scale: float,
    basis_scale: float,
    threshold: float,
    salience: bool,
) -> tuple[Tensor, Tensor]:
    """Scores of the strategy `connectivity`; see `sparsiattn.kernels.native.scores`.

    Args:
        q: Queries ``[B, H, N, D]`` float32.
        k: Keys ``[B, H, Nk, D]`` float32.
        order: Patch queries of every tile, ``[T, t]``.
        held: Number of distinct queries of each tile, ``[T]``; None if all are.
        block_order: Patch keys of every block, ``[U, g]``.
        block_held: Number of distinct keys of each block, ``[U]``; None if all are.
        down: ``[P + U, K]``, units to basis.
        up: ``[P + U, K]``, basis to units.
        own: ``[1]``, the factor of ``shares``; None for no such term.
        shares: ``[T, U]``, the share of each tile's queries in each block.
        count: Number of blocks to choose.
        prefix: Number of leading tokens that are not patches, P.
        scale: Factor of QK^T.
        basis_scale: Factor of the coefficients.
        threshold: Entries of abs(up) of at most this value count as zero.
        salience: Whether the attention of the mean query to a block raises the block's scores.

    Returns:
        Scores ``[B, H, T, U]``, and indices of the best blocks of each row,
        ``[B, H, T, count]``, as from `_top`.
    """
    q, k = with_rows(q), with_rows(k)
    tables = (order, held, block_order, block_held, down, up, own, shares)
    tensors = [q, k, *(contiguous(x) for x in tables)]
    (b, h, _, d), (tiles, tile), (blocks, block) = q.shape, order.shape, block_order.shape
    basis, threads = down.shape[1], torch.get_num_threads()
    units, width = prefix + blocks, -(-d // SPAN) * SPAN
    # `head_plan` in plan.c divides this memory
    shared = h * ((1 + tiles + units) * width + whole_vectors(blocks) * block)
    each = _thread_room(units, blocks, basis, width)
    group = max(1, min(b, PLANNED_AT_ONCE // shared))
    size = whole_vectors(blocks * basis) + group * shared + threads * each
    room = SCRATCH.numbers("plan", size, q) if size < PLAN_KEPT else torch.empty(size)
    out = torch.empty(b, h, tiles, blocks)
    chosen = torch.empty(b, h, tiles, count, dtype=torch.int64)
    sizes = (b, h, d, prefix, tiles, tile, blocks, block, basis)
    steps = (*q.stride()[:3], *k.stride()[:3])
    numbers = (*sizes, *steps, count, threads, group, shared, each)
    addresses = addresses_of(*tensors, out, room, chosen)
    scales = (scale, basis_scale, threshold, salience)
    build.code().score(entries.SCORE_CALL.pack(*numbers, *addresses, parallel(), *scales))
    return out, chosen


torch.library.impl(_SCORES, "CPU", _scores)


def _thread_room(units: int, blocks: int, basis: int, width: int) -> int:
    """Size of a thread's memory in floats, which `score_head` in plan.c divides."""
    rows = 2 * max(units, basis) + 16 + (SPAN + basis) * width
    columns = (units + basis + blocks) * SPAN + basis + whole_vectors(blocks) + 64
    return whole_vectors(rows + columns)


@torch.library.register_fake(_SCORES)  # type: ignore[untyped-decorator]
def _scores_shape(q: Tensor, k: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    order, _, block_order, *_ = others
    rows, count = (*q.shape[:2], order.shape[0]), others[8]
    return q.new_empty(*rows, block_order.shape[0]), q.new_empty(*rows, count, dtype=torch.int64)


def _scores_flops(q_shape: Any, k_shape: Any, *others: Any, **options: Any) -> int:
    """FLOPs of the same products in torch."""
    order, _, block_order, _, down, *_ = others
    (b, h, _, d), tiles, blocks, (units, basis) = q_shape, order[0], block_order[0], down
    prefix, salience = others[9], others[13]
    macs = basis * units * d + tiles * basis * (d + blocks)
    if salience:
        macs += units * (d + 2 * basis) + (k_shape[-2] - prefix) * d
    return int(2 * b * h * macs)


FLOP_FORMULAS: dict[Any, Callable[..., int]] = {torch.ops.sparsiattn.native_scores: _scores_flops}
"""FLOP formulas by operator.

`mac_counter` passes them to `torch.utils.flop_counter`, which is not imported here because it
imports triton.
"""


_TOP = "sparsiattn::native_top"
torch.library.define(_TOP, "(Tensor scores, int count) -> Tensor")


@torch.library.impl(_TOP, "CPU")
def _top(scores: Tensor, count: int) -> Tensor:
    """Indices of the best scores of each row, best first; equal scores in ascending order.

    Args:
        scores: ``[..., U]`` float32; NaN counts as largest.
        count: Number of scores to choose.

    Returns:
        ``[..., count]``.

    Raises:
        MemoryError: A thread could not allocate memory.
    """
    scores, columns = scores.contiguous(), scores.shape[-1]
    out = torch.empty(*scores.shape[:-1], count, dtype=torch.int64)
    if not out.numel():
        return out
    rows, threads = scores.numel() // columns, torch.get_num_threads()
    addresses = addresses_of(scores, out)
    call = entries.TOP_CALL.pack(rows, columns, count, threads, *addresses, parallel())
    if not build.code().top(call):
        raise MemoryError(f"not enough memory to choose {count} of {columns} scores")
    return out


@torch.library.register_fake(_TOP)  # type: ignore[untyped-decorator]
def _top_shape(scores: Tensor, count: int) -> Tensor:
    return scores.new_empty(*scores.shape[:-1], count, dtype=torch.int64)


native_top = torch.ops.sparsiattn.native_top.default


KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.bool: 3}
"""Dtypes that compiled code reads, numbered as in numbers.h."""

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def host_width(keys: int, across: int) -> int:
    """How many numbers the host's bias of one query consists of: one per key, or its factors."""
    return keys // across + across if across else keys


def host_bias(bias: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The host's bias expanded to ``shape``, ``[B, H, Nq, Nk]``, without copying shared rows."""
    if bias.dtype not in KINDS:
        bias = bias.float()
    return with_rows(bias.expand(shape))


def with_rows(x: Tensor) -> Tensor:
    """The tensor with contiguous rows, as compiled code needs them; other axes keep any strides."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def addresses_of(*tensors: Tensor | None) -> list[int]:
    return [0 if x is None else x.data_ptr() for x in tensors]


def whole_vectors(numbers: int) -> int:
    """Round up to a multiple of the widest vectors."""
    return -(-numbers // 16) * 16


def _lead_strides(x: Tensor | None) -> tuple[int, int]:
    """Strides along images and heads of a contiguous tensor; 0 where it is broadcast."""
    if x is None:
        return 0, 0
    images, heads, *matrix = x.shape
    each = matrix[0] * matrix[1]
    return (0 if images == 1 else heads * each), (0 if heads == 1 else each)


def scores(q: Tensor, k: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    """The operator ``native_scores``, called directly where nothing observes operators."""
    operator = _scores if is_unobserved(q, k) else torch.ops.sparsiattn.native_scores.default
    return operator(q, k, *others)


def attention(q: Tensor, k: Tensor, v: Tensor, *others: Any) -> Tensor:
    """The operator ``native_attention``, called directly where nothing observes operators."""
    if type(v) is Tensor and is_unobserved(q, k):
        return _attention(q, k, v, *others)
    return torch.ops.sparsiattn.native_attention.default(q, k, v, *others)  # type: ignore[no-any-return]
