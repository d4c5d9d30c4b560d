"""Forward pass: one program per query tile walks that tile's keys with a running softmax."""

import triton
import triton.language as tl

from sparsiattn.kernels._triton.parts import (
    LOG2E,
    at_rows,
    cell_logits,
    host_logits,
    key_tokens,
    product,
    query_tokens,
    within,
    work_of,
)


@triton.jit
def take_in(s, v, acc, top, total):
    """Some more keys enter the softmax (online softmax, arXiv 1805.02867)."""
    new = tl.maximum(top, tl.max(s, 1))
    # a row that has seen no key yet: minus infinity less itself is not a number
    base = tl.where(new == float("-inf"), 0.0, new)
    p = tl.exp2(s - base[:, None])
    fade = tl.exp2(top - base)
    total = total * fade + tl.sum(p, 1)
    acc = product(p.to(v.dtype), v, acc * fade[:, None])
    return acc, new, total


@triton.jit
def forward(
    q, k, v, pooled_k, pooled_v, out, lse, host, rows, order, weight, chosen, held, table,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, out_b, out_h, out_n,
    host_b, host_h, host_m, host_n, rows_b, rows_h, rows_m, rows_g, list_b, list_h, list_t,
    heads, tiles, parts, slots, queries, first, keys, prefix, cells, scale,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, WIDE: tl.constexpr, VALUE_WIDE: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, CELLS: tl.constexpr, UNIT: tl.constexpr,
    BY_TILE: tl.constexpr, BOOLEAN: tl.constexpr, LOWEST: tl.constexpr,
):  # fmt: skip
    image, head, tile, part = work_of(heads, tiles, parts)
    token, live = query_tokens(order, weight, tile, part, slots, ROWS)
    row = token + first
    mine, values = within(live, DIM, WIDE), within(live, VALUE_DIM, VALUE_WIDE)
    queries_at = q + image * q_b + head * q_h + at_rows(row, q_n, WIDE)
    query = tl.load(queries_at, mask=mine, other=0.0)
    k += image * k_b + head * k_h
    v += image * v_b + head * v_h
    chosen += image * list_b + head * list_h + tile * list_t
    if held is not None:
        held += image * list_b + head * list_h + tile * list_t
    pair = image * heads + head

    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, VALUE_WIDE], tl.float32)
    for start in range(0, keys, KEYS):
        place = start + tl.arange(0, KEYS)
        key, there = key_tokens(place, chosen, held, table, keys, prefix, UNIT)
        key_rows = tl.load(k + at_rows(key, k_n, WIDE), mask=within(there, DIM, WIDE), other=0.0)
        s = product(query, tl.trans(key_rows)) * (scale * LOG2E)
        if host is not None:
            at = image * host_b + head * host_h + row[:, None] * host_m + key[None, :] * host_n
            s += host_logits(host, at, live[:, None] & there[None, :], BOOLEAN, LOWEST)
        s = tl.where(there[None, :], s, float("-inf"))
        value_rows = tl.load(
            v + at_rows(key, v_n, VALUE_WIDE), mask=within(there, VALUE_DIM, VALUE_WIDE), other=0.0
        )
        acc, top, total = take_in(s, value_rows, acc, top, total)

    if rows is not None:
        pooled_k += pair * cells * DIM
        pooled_v += pair * cells * VALUE_DIM
        for start in range(0, cells, CELLS):
            cell = start + tl.arange(0, CELLS)
            there = cell < cells
            key_rows = tl.load(
                pooled_k + at_rows(cell, DIM, WIDE), mask=within(there, DIM, WIDE), other=0.0
            )
            s = product(query, tl.trans(key_rows)) * (scale * LOG2E)
            who = tl.where(live, tile, 0) if BY_TILE else token
            at = image * rows_b + head * rows_h + who[:, None] * rows_m + cell[None, :] * rows_g
            s += cell_logits(rows, at, live[:, None] & there[None, :])
            s = tl.where(there[None, :], s, float("-inf"))
            value_rows = tl.load(
                pooled_v + at_rows(cell, VALUE_DIM, VALUE_WIDE),
                mask=within(there, VALUE_DIM, VALUE_WIDE), other=0.0,
            )  # fmt: skip
            acc, top, total = take_in(s, value_rows, acc, top, total)

    dead = total == 0.0
    total = tl.where(dead, 1.0, total)
    acc = acc / total[:, None]
    result = out + image * out_b + head * out_h + at_rows(row, out_n, VALUE_WIDE)
    tl.store(result, acc.to(out.dtype.element_ty), mask=values)
    # a finite number for rows without a key: their weights then come out as zero again
    tl.store(lse + pair * queries + token, tl.where(dead, 0.0, top + tl.log2(total)), mask=live)
