"""The compiled code as operators of torch, opaque to its compiler; forward only."""

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
BAND_NUMBERS = 6  # of every patch, as `find_bands` in bands.h divides them
# numbers of all images that are planned at once, about
PLANNED_AT_ONCE = 1 << 21
# a larger workspace is not kept: using it takes longer than getting it
PLAN_KEPT = 1 << 20


def parallel() -> int:
    """Address of the function by which the compiled code runs a region in torch's own threads; 0
    where there is none, and calls then run in one thread."""
    return build.code().parallel


# Operators are defined by hand: the Python around `torch.library.custom_op` costs as much as a
# small call. Exported programs store the names of their arguments, so these stay as they are.
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
    """Attention of query tiles to their lists.

    Args:
        q: Queries ``[B, H, first + n, D]`` float32 of any strides.
        k: Keys ``[B, H, Nk, D]``, with the prefix.
        v: Values ``[B, H, Nk, Dv]``.
        chosen: Keys, or blocks of ``table``, of every tile, ``[B|1, H|1, T, C]``.
        table: Patch keys of every block, ``[U, g]``; lists then begin with the prefix.
        held: How many keys of each block count, ``[U]``; None for all.
        order: Patch queries of every tile, ``[T, t]``; None where each is alone.
        cells: The summary's cell of every key, ``[Nk]``; G for keys in none.
        bias: Logits of the summary, ``[B|1, H|1, T or n, G]``; None for the log of how many of a
            cell's keys a list leaves out.
        count: Keys of the summary, G; 0 without one.
        listed: Length of every list.
        prefix: Leading keys that begin every list of blocks.
        first: Leading queries, which see every key.
        scale: Factor of QK^T.
        host: The host's bias, ``[B|1, H|1, N|1, Nk]``, additive or boolean, or its factors.
        hard: Whether it forbids keys; with a summary, the same keys to every query of a head.
        across: As in `HostBias`.

    Returns:
        ``[B, H, first + n, Dv]``, in the type of the operands.
    """
    dtype, n = q.dtype, q.shape[-2]
    # a tile reads its keys many times: converted once, they cost less than converted on the way
    q, k, v = (with_rows(x.float()) for x in (q, k, v))
    b, h, width = *q.shape[:2], v.shape[-1]
    # [B, N, H, Dv] in memory, which the host's reshape need not copy
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
    """A packed `ATTEND_CALL`, arguments as in `_attention`, and what must live until it ends."""
    chosen = chosen.contiguous()
    bias = None if bias is None else bias.to(torch.float32)
    optional = [contiguous(x) for x in (table, held, order, cells, bias)]
    (b, h, n, d), width = q.shape, v.shape[-1]
    # divided by `head_of` in attention.c
    room = b * h * (whole_vectors(count * (d + width + 1)) + 16)
    given: tuple[int, ...] = (0, 0, 0, 0, 0, 0)
    if host is not None:
        exact = host if host.dtype in (torch.float32, torch.bool) else host.float()
        host = host_bias(exact, (b, h, n, host_width(k.shape[-2], across)))
        hard = hard or host.dtype is torch.bool
        given = (KINDS[host.dtype], *host.stride()[:3], hard, across)
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
    numbers = (*sizes, *lists, *summary, *steps, torch.get_num_threads(), *given)
    addresses = (*addresses_of(*tensors), parallel())
    return entries.ATTEND_CALL.pack(*numbers, *addresses, scale), tensors


torch.library.impl(_ATTENTION, "CPU", _attention)


@torch.library.register_fake(_ATTENTION)  # type: ignore[untyped-decorator]
def _attention_shape(q: Tensor, k: Tensor, v: Tensor, *others: object) -> Tensor:
    b, h, n, _ = q.shape
    # laid out as torch's own attention does, so that the host's reshape copies nothing
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
        held: How many of a tile's queries count, ``[T]``; None for all.
        block_order: Patch keys of every block, ``[U, g]``.
        block_held: How many of a block's keys count, ``[U]``; None for all.
        down: ``[P + U, K]``, units to basis.
        up: ``[P + U, K]``, basis to units.
        own: ``[1]``, the factor of ``shares``; None for none.
        shares: ``[T, U]``, the share of each tile's queries in each block.
        count: Blocks to choose.
        prefix: Leading tokens that are not patches, P.
        scale: Factor of QK^T.
        basis_scale: Factor of the coefficients.
        threshold: Entries of abs(up) up to it count as zero.
        salience: Whether what the mean query sees of a block raises its scores.

    Returns:
        Scores ``[B, H, T, U]``, and places of the best of each row, ``[B, H, T, count]``, as
        `_top` gives them.
    """
    q, k = with_rows(q), with_rows(k)
    tables = (order, held, block_order, block_held, down, up, own, shares)
    tensors = [q, k, *(contiguous(x) for x in tables)]
    (b, h, _, d), (tiles, tile), (blocks, block) = q.shape, order.shape, block_order.shape
    basis, threads = down.shape[1], torch.get_num_threads()
    units, width = prefix + blocks, -(-d // SPAN) * SPAN
    # divided by `head_plan` in plan.c
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
    """Numbers that a thread needs, as `score_head` in plan.c divides them."""
    rows = 2 * max(units, basis) + 16 + (SPAN + basis) * width
    columns = (units + basis + blocks) * SPAN + basis + whole_vectors(blocks) + 64
    return whole_vectors(rows + columns)


@torch.library.register_fake(_SCORES)  # type: ignore[untyped-decorator]
def _scores_shape(q: Tensor, k: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    order, _, block_order, *_ = others
    rows, count = (*q.shape[:2], order.shape[0]), others[8]
    return q.new_empty(*rows, block_order.shape[0]), q.new_empty(*rows, count, dtype=torch.int64)


def _scores_flops(q_shape: Any, k_shape: Any, *others: Any, **options: Any) -> int:
    """Those of the same products in torch."""
    order, _, block_order, _, down, *_ = others
    (b, h, _, d), tiles, blocks, (units, basis) = q_shape, order[0], block_order[0], down
    prefix, salience = others[9], others[13]
    macs = basis * units * d + tiles * basis * (d + blocks)
    if salience:
        macs += units * (d + 2 * basis) + (k_shape[-2] - prefix) * d
    return int(2 * b * h * macs)


FLOP_FORMULAS: dict[Any, Callable[..., int]] = {torch.ops.sparsiattn.native_scores: _scores_flops}
"""For `torch.utils.flop_counter`, whose import brings triton: `mac_counter` gives it these."""


_TOP = "sparsiattn::native_top"
torch.library.define(_TOP, "(Tensor scores, int count) -> Tensor")


@torch.library.impl(_TOP, "CPU")
def _top(scores: Tensor, count: int) -> Tensor:
    """Places of the best of each row, best first and of equal ones the first first.

    Args:
        scores: ``[..., U]`` float32; NaN counts as largest.
        count: How many to choose.

    Returns:
        ``[..., count]``.

    Raises:
        MemoryError: A thread got no memory for the choice.
    """
    scores, columns = scores.contiguous(), scores.shape[-1]
    out = torch.empty(*scores.shape[:-1], count, dtype=torch.int64)
    if not out.numel():
        return out
    rows, threads = scores.numel() // columns, torch.get_num_threads()
    addresses = addresses_of(scores, out)
    call = entries.TOP_CALL.pack(rows, columns, count, threads, *addresses, parallel())
    if not build.code().top(call):
        raise MemoryError(f"no room to choose {count} of {columns} scores")
    return out


@torch.library.register_fake(_TOP)  # type: ignore[untyped-decorator]
def _top_shape(scores: Tensor, count: int) -> Tensor:
    return scores.new_empty(*scores.shape[:-1], count, dtype=torch.int64)


native_top = torch.ops.sparsiattn.native_top.default


KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.bool: 3}
"""Types that compiled code reads, as in numbers.h."""

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def host_width(keys: int, across: int) -> int:
    """Numbers that the host's bias of a query is given by: of every key, or factors."""
    return keys // across + across if across else keys


def host_bias(bias: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The host's bias for every query and key, ``[B, H, Nq, Nk]``; shared rows are not copied."""
    if bias.dtype not in KINDS:
        bias = bias.float()
    return with_rows(bias.expand(shape))


def with_rows(x: Tensor) -> Tensor:
    """With rows that are contiguous, as the compiled code reads them; the other axes have steps."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def addresses_of(*tensors: Tensor | None) -> list[int]:
    return [0 if x is None else x.data_ptr() for x in tensors]


def whole_vectors(numbers: int) -> int:
    """Rounded up to the widest vectors."""
    return -(-numbers // 16) * 16


def _lead_strides(x: Tensor | None) -> tuple[int, int]:
    """Steps along images and heads of a contiguous tensor; none along what all share."""
    if x is None:
        return 0, 0
    images, heads, *matrix = x.shape
    each = matrix[0] * matrix[1]
    return (0 if images == 1 else heads * each), (0 if heads == 1 else each)


def scores(q: Tensor, k: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    """As the operator ``native_scores``."""
    operator = _scores if is_unobserved(q, k) else torch.ops.sparsiattn.native_scores.default
    return operator(q, k, *others)


def attention(q: Tensor, k: Tensor, v: Tensor, *others: Any) -> Tensor:
    """As the operator ``native_attention``."""
    if type(v) is Tensor and is_unobserved(q, k):
        return _attention(q, k, v, *others)
    return torch.ops.sparsiattn.native_attention.default(q, k, v, *others)  # type: ignore[no-any-return]
