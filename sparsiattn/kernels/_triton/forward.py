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
    program_work,
    query_tokens,
    within,
)


@triton.jit
def add_to_softmax(s, v, acc, row_max, row_sum):
    """Some more keys enter the softmax (online softmax, arXiv 1805.02867)."""
    new_max = tl.maximum(row_max, tl.max(s, 1))
    # a row that has seen no key yet: minus infinity less itself is not a number
    finite_max = tl.where(new_max == float("-inf"), 0.0, new_max)
    p = tl.exp2(s - finite_max[:, None])
    decay = tl.exp2(row_max - finite_max)
    row_sum = row_sum * decay + tl.sum(p, 1)
    acc = product(p.to(v.dtype), v, acc * decay[:, None])
    return acc, new_max, row_sum


@triton.jit
def forward(
    q, k, v, pooled_k, pooled_v, out, lse, host, rows, order, weight, chosen, held, table,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, out_b, out_h, out_n,
    host_b, host_h, host_m, host_n, rows_b, rows_h, rows_m, rows_g, chosen_b, chosen_h, chosen_t,
    heads, tiles, parts, slots, queries, first, keys, prefix, cells, scale,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, WIDE: tl.constexpr, VALUE_WIDE: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, CELLS: tl.constexpr, UNIT: tl.constexpr,
    BY_TILE: tl.constexpr, BOOLEAN: tl.constexpr, LOWEST: tl.constexpr,
):  # fmt: skip
    image, head, tile, part = program_work(heads, tiles, parts)
    token, valid = query_tokens(order, weight, tile, part, slots, ROWS)
    row = token + first
    query_mask, result_mask = within(valid, DIM, WIDE), within(valid, VALUE_DIM, VALUE_WIDE)
    queries_at = q + image * q_b + head * q_h + at_rows(row, q_n, WIDE)
    query = tl.load(queries_at, mask=query_mask, other=0.0)
    k += image * k_b + head * k_h
    v += image * v_b + head * v_h
    chosen += image * chosen_b + head * chosen_h + tile * chosen_t
    if held is not None:
        held += image * chosen_b + head * chosen_h + tile * chosen_t
    pair = image * heads + head

    row_max = tl.full([ROWS], float("-inf"), tl.float32)
    row_sum = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, VALUE_WIDE], tl.float32)
    for start in range(0, keys, KEYS):
        place = start + tl.arange(0, KEYS)
        key, present = key_tokens(place, chosen, held, table, keys, prefix, UNIT)
        key_rows = tl.load(k + at_rows(key, k_n, WIDE), mask=within(present, DIM, WIDE), other=0.0)
        s = product(query, tl.trans(key_rows)) * (scale * LOG2E)
        if host is not None:
            offsets = image * host_b + head * host_h + row[:, None] * host_m + key[None, :] * host_n
            s += host_logits(host, offsets, valid[:, None] & present[None, :], BOOLEAN, LOWEST)
        s = tl.where(present[None, :], s, float("-inf"))
        values_at = v + at_rows(key, v_n, VALUE_WIDE)
        value_mask = within(present, VALUE_DIM, VALUE_WIDE)
        value_rows = tl.load(values_at, mask=value_mask, other=0.0)
        acc, row_max, row_sum = add_to_softmax(s, value_rows, acc, row_max, row_sum)

    if rows is not None:
        pooled_k += pair * cells * DIM
        pooled_v += pair * cells * VALUE_DIM
        for start in range(0, cells, CELLS):
            cell = start + tl.arange(0, CELLS)
            present = cell < cells
            keys_at = pooled_k + at_rows(cell, DIM, WIDE)
            key_rows = tl.load(keys_at, mask=within(present, DIM, WIDE), other=0.0)
            s = product(query, tl.trans(key_rows)) * (scale * LOG2E)
            bias_row = tl.where(valid, tile, 0) if BY_TILE else token
            start_of_rows = image * rows_b + head * rows_h
            offsets = start_of_rows + bias_row[:, None] * rows_m + cell[None, :] * rows_g
            s += cell_logits(rows, offsets, valid[:, None] & present[None, :])
            s = tl.where(present[None, :], s, float("-inf"))
            values_at = pooled_v + at_rows(cell, VALUE_DIM, VALUE_WIDE)
            value_mask = within(present, VALUE_DIM, VALUE_WIDE)
            value_rows = tl.load(values_at, mask=value_mask, other=0.0)
            acc, row_max, row_sum = add_to_softmax(s, value_rows, acc, row_max, row_sum)

    empty = row_sum == 0.0
    row_sum = tl.where(empty, 1.0, row_sum)
    acc = acc / row_sum[:, None]
    result = out + image * out_b + head * out_h + at_rows(row, out_n, VALUE_WIDE)
    tl.store(result, acc.to(out.dtype.element_ty), mask=result_mask)
    # a finite number for rows without a key: their weights then come out as zero again
    sums_at = lse + pair * queries + token
    tl.store(sums_at, tl.where(empty, 0.0, row_max + tl.log2(row_sum)), mask=valid)
