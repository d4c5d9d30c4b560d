"""The kernel `pool`: means of keys and values over groups of tokens, both in one pass."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from sparsiattn.kernels._triton.kernels import at_rows, within
from sparsiattn.kernels._triton.launch import Launch, padded, readable_mask, strides


@triton.jit
def pool(
    k, v, members, sizes, allowed, mean_k, mean_v,
    k_b, k_h, k_n, v_b, v_h, v_n, allowed_b, allowed_h, allowed_n,
    heads, groups, slots,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, WIDE: tl.constexpr, VALUE_WIDE: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """One program computes one group of one head; sums are in float32."""
    program = tl.program_id(0)
    group, pair = program % groups, (program // groups).to(tl.int64)
    image, head = pair // heads, pair % heads
    k += image * k_b + head * k_h
    v += image * v_b + head * v_h
    size = tl.load(sizes + group)
    sum_k = tl.zeros([WIDE], tl.float32)
    sum_v = tl.zeros([VALUE_WIDE], tl.float32)
    used = tl.zeros([ROWS], tl.int32)
    for start in range(0, size, ROWS):
        slot = start + tl.arange(0, ROWS)
        present = slot < size
        token = tl.load(members + group * slots + slot, mask=present, other=0)
        if allowed is not None:
            allowed_at = allowed + image * allowed_b + head * allowed_h + token * allowed_n
            present = present & (tl.load(allowed_at, mask=present, other=0) != 0)
        used += present.to(tl.int32)
        keys = tl.load(k + at_rows(token, k_n, WIDE), mask=within(present, DIM, WIDE), other=0.0)
        sum_k += tl.sum(keys.to(tl.float32), 0)
        value_mask = within(present, VALUE_DIM, VALUE_WIDE)
        values = tl.load(v + at_rows(token, v_n, VALUE_WIDE), mask=value_mask, other=0.0)
        sum_v += tl.sum(values.to(tl.float32), 0)
    count = tl.maximum(tl.sum(used, 0), 1).to(tl.float32)
    row = pair * groups + group
    at, value_at = tl.arange(0, WIDE), tl.arange(0, VALUE_WIDE)
    mean = (sum_k / count).to(mean_k.dtype.element_ty)
    value_mean = (sum_v / count).to(mean_v.dtype.element_ty)
    tl.store(mean_k + row * DIM + at, mean, mask=at < DIM)
    tl.store(mean_v + row * VALUE_DIM + value_at, value_mean, mask=value_at < VALUE_DIM)


def launch(
    k: Tensor, v: Tensor, members: Tensor, sizes: Tensor, allowed: Tensor | None,
    mean_k: Tensor, mean_v: Tensor,
) -> Launch:  # fmt: skip
    """The launch of `pool`.

    Args:
        k: Keys ``[B, H, Nk, D]`` with contiguous rows.
        v: Values ``[B, H, Nk, Dv]`` with contiguous rows.
        members: Tokens of every group, ``[G, s]``.
        sizes: How many of these each group has, ``[G]``.
        allowed: Keys that may enter a mean, boolean ``[B|1, H|1, Nk]``; None for all.
        mean_k: Receives ``[B, H, G, D]``.
        mean_v: Receives ``[B, H, G, Dv]``.
    """
    (batch, heads, _, dim), value_dim, groups = k.shape, v.shape[-1], members.shape[0]
    wide, value_wide = padded(dim), padded(value_dim)
    arguments: dict[str, Any] = {
        "k": k, "v": v, "members": members, "sizes": sizes, "allowed": readable_mask(allowed),
        "mean_k": mean_k, "mean_v": mean_v,
        **strides("k", k, "bhn"), **strides("v", v, "bhn"), **strides("allowed", allowed, "bhn"),
        "heads": heads, "groups": groups, "slots": members.shape[1],
        "DIM": dim, "VALUE_DIM": value_dim, "WIDE": wide, "VALUE_WIDE": value_wide,
        "ROWS": min(64, 4096 // max(wide, value_wide)),
    }  # fmt: skip
    return Launch(pool, batch * heads * groups, arguments, warps=4, stages=1)
