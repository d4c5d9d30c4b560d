"""A call of the compiled code: operands as one C structure."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from sparsiattn.kernels.workspace import SCRATCH

# The orders of `Call` in chunks.c, and of `Plan` and `Top` in plan.c.
_CALL = struct.Struct("@32q12Pd")
_PLAN = struct.Struct("@20q14P3dq")
_TOP = struct.Struct("@4q3P")
SPAN = 64
# numbers of all images that are planned at once, about
AT_ONCE = 1 << 21
MOST_KEPT = 1 << 20


def sizes() -> tuple[int, ...]:
    """Bytes of these calls, which must be those that the compiled code expects."""
    return _CALL.size, _PLAN.size, _TOP.size


@cache
def parallel() -> int:
    """Address of the function by which torch's own OpenMP runs a region in its threads, so that no
    second pool competes with it; 0 where there is none, and calls then run in one thread."""
    here = Path(torch.__file__).parent
    for path in sorted((*here.glob("lib/lib*omp*.so*"), *here.parent.glob("torch.libs/lib*omp*"))):
        try:
            found = ctypes.CDLL(str(path)).GOMP_parallel
        except (OSError, AttributeError):  # another library, or one of another interface
            continue
        return ctypes.cast(found, ctypes.c_void_p).value or 0
    return 0


def attend(
    run: Callable[[bytes], None],
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
) -> Tensor:
    """What `sparsiattn.kernels.native.ops` computes."""
    (b, h, n, d), wide = q.shape, v.shape[-1]
    # [B, N, H, Dv] in memory, which the host's reshape need not copy
    out = torch.empty_strided((b, h, n, wide), (n * h * wide, wide, h * wide, 1), dtype=q.dtype)
    # as `head_of` cuts it
    pooled = SCRATCH.numbers("pooled", b * h * (_up(count * (d + wide)) + 16), q)
    lists, slots = chosen.shape[-2], 1 if order is None else order.shape[1]
    numbers = (
        b, h, k.shape[-2], d, wide,
        first, lists, slots,
        chosen.shape[-1], *_lead(chosen),
        0 if table is None else table.shape[1], listed, prefix,
        count, count > 0 and bias is None,
        bias is not None and bias.shape[-2] == lists, *_lead(bias),
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3],
        torch.get_num_threads(),
    )  # fmt: skip
    tensors = (q, k, v, out, chosen, table, held, order, cells, bias, pooled)
    places = (0 if x is None else x.data_ptr() for x in tensors)
    run(_CALL.pack(*numbers, *places, parallel(), scale))
    return out


def score(
    run: Callable[[bytes], None],
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
    """What `sparsiattn.kernels.native.ops` computes as ``native_scores``."""
    (b, h, _, d), (tiles, tile), (blocks, block) = q.shape, order.shape, block_order.shape
    basis, threads = down.shape[1], torch.get_num_threads()
    units, wide = prefix + blocks, -(-d // SPAN) * SPAN
    # as `head_plan` and `score_head` cut them
    shared = h * ((1 + tiles + units) * wide + _up(blocks) * block)
    each = 2 * max(units, basis) + 16 + (SPAN + basis) * wide
    each = _up(each + (units + basis + blocks) * SPAN + basis + _up(blocks) + 64)
    group = max(1, min(b, AT_ONCE // shared))
    numbers = _up(blocks * basis) + group * shared + threads * each
    # kept where getting it anew takes longer than what is done in it, else given back at once
    room = SCRATCH.numbers("plan", numbers, q) if numbers < MOST_KEPT else torch.empty(numbers)
    out = torch.empty(b, h, tiles, blocks)
    chosen = torch.empty(b, h, tiles, count, dtype=torch.int64)
    told = (
        b, h, d, prefix, tiles, tile, blocks, block, basis,
        *q.stride()[:3], *k.stride()[:3], count, threads, group, shared, each,
    )  # fmt: skip
    tensors = (q, k, order, held, block_order, block_held, down, up, own, shares, out, room, chosen)
    places = (0 if x is None else x.data_ptr() for x in tensors)
    run(_PLAN.pack(*told, *places, parallel(), scale, basis_scale, threshold, salience))
    return out, chosen


def top(run: Callable[[bytes], int], scores: Tensor, count: int) -> Tensor:
    """What `sparsiattn.kernels.native.ops` computes as ``native_top``."""
    columns = scores.shape[-1]
    out = torch.empty(*scores.shape[:-1], count, dtype=torch.int64)
    if not out.numel():
        return out
    rows, threads = scores.numel() // columns, torch.get_num_threads()
    places = (scores.data_ptr(), out.data_ptr(), parallel())
    if not run(_TOP.pack(rows, columns, count, threads, *places)):
        raise MemoryError(f"no room to choose {count} of {columns} scores")
    return out


def _up(numbers: int) -> int:
    """To whole vectors, the widest ones."""
    return -(-numbers // 16) * 16


def _lead(x: Tensor | None) -> tuple[int, int]:
    """Steps along images and heads of a contiguous tensor; none along what all share."""
    if x is None:
        return 0, 0
    images, heads = x.shape[:2]
    each = x.shape[2] * x.shape[3]
    return (0 if images == 1 else heads * each), (0 if heads == 1 else each)
