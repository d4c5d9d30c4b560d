"""The Triton kernels, forward and backward.

Forward pass: one program per query tile walks through that tile's keys with a running softmax. The
leading (prefix) queries are one more tile, whose keys are all of them.
Backward pass: one program per query tile recomputes that tile's weights, accumulates the gradient
of its queries, and adds the gradients of its keys atomically (several tiles share a key), in
float32. Where gradients have to be the same in every run, it leaves the keys to
`sparsiattn.kernels._triton.key_gradients`.

Arguments are those of `sparsiattn.kernels._triton.launch.KeyListOperands`; names of strides end in
the letter of their axis, see `sparsiattn.kernels._triton.launch.AXES`.
"""

import triton
import triton.language as tl

# triton's interpreter stores bfloat16 as integers and would multiply these
WIDEN = tl.constexpr(triton.knobs.runtime.interpret)
LOG2E = tl.constexpr(1.4426950408889634)
"""Logits are in base 2, because the hardware computes exp2."""


@triton.jit
def program_work(heads, tiles, parts, dense_parts, dense_programs, DENSE: tl.constexpr):
    """Image, head, tile and part of the tile that this program computes, and whether it is dense.

    The leading queries of a head are one more tile, dense because it sees every key. Its programs
    take longest, so they come first. Parts of a tile and tiles of a head have neighbouring
    programs, so that keys stay in the cache.
    """
    program = tl.program_id(0)
    dense = False
    if DENSE:
        dense = program < dense_programs
        program = tl.where(dense, program, program - dense_programs)
        parts = tl.where(dense, dense_parts, parts)
        tiles = tl.where(dense, 1, tiles)
    part = program % parts
    tile = (program // parts) % tiles
    pair = program // parts // tiles
    image, head = pair // heads, pair % heads
    return image.to(tl.int64), head.to(tl.int64), tile.to(tl.int64), part, dense


@triton.jit
def are_queries(slot, weight, tile, dense, slots, first, DENSE: tl.constexpr):
    """Which slots of a tile hold a query, and none that another slot holds, too."""
    listed = slot < slots
    if weight is not None:
        listed = listed & (tl.load(weight + tile * slots + slot, mask=listed, other=0.0) > 0.0)
    if DENSE:
        listed = listed & (slot < tl.where(dense, 0, slots))
        listed = listed | (slot < tl.where(dense, first, 0))
    return listed


@triton.jit
def key_tokens(
    place, chosen, held, table, dense, keys, prefix, UNIT: tl.constexpr, DENSE: tl.constexpr
):
    """Keys at these positions of a list, and which of the positions hold one."""
    present = place < keys
    listed = present
    if DENSE:
        listed = place < tl.where(dense, 0, keys)
    if table is None:
        token = tl.load(chosen + place, mask=listed, other=0)
    else:
        listed = listed & (place >= prefix)
        unit = (place - prefix) // UNIT
        slot = (place - prefix) % UNIT
        block = tl.load(chosen + unit, mask=listed, other=0)
        token = tl.load(table + block * UNIT + slot, mask=listed, other=0) + prefix
        if held is not None:
            size = tl.load(held + unit, mask=listed, other=0)
            present = present & ((slot < size) | (place < prefix))
            if DENSE:
                present = present | (place < tl.where(dense, keys, 0))
    if DENSE or table is not None:
        token = tl.where(listed, token, place)
    return token, present


@triton.jit
def at_rows(token, stride, WIDTH: tl.constexpr):
    """Offsets of complete rows, ``[len(token), WIDTH]``."""
    return token[:, None] * stride + tl.arange(0, WIDTH)[None, :]


@triton.jit
def within(present, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Mask of the elements of rows ``[len(present), PADDED]`` that exist."""
    mask = present[:, None]
    if WIDTH < PADDED:
        mask = mask & (tl.arange(0, PADDED) < WIDTH)[None, :]
    return mask


@triton.jit
def host_logits(host, offsets, pairs, BOOLEAN: tl.constexpr, LOWEST: tl.constexpr):
    """The host's mask at some pairs; entries of at most ``LOWEST`` forbid."""
    stored = tl.load(host + offsets, mask=pairs, other=0)
    if BOOLEAN:
        bias = tl.where(stored != 0, 0.0, float("-inf"))
    else:
        bias = stored.to(tl.float32)
        if LOWEST is not None:
            bias = tl.where(bias > LOWEST, bias, float("-inf"))
    return bias * LOG2E


@triton.jit
def cell_logits(rows, offsets, pairs):
    """Logits of summary keys; minus infinity where a cell stands for no key."""
    return tl.load(rows + offsets, mask=pairs, other=0.0).to(tl.float32) * LOG2E


@triton.jit
def product(a, b, acc=None):
    """``a @ b + acc``, accumulated in float32, never in TF32."""
    if WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def add_to_softmax(s, v, acc, row_max, row_sum):
    """Add more keys to the running softmax (online softmax, arXiv 1805.02867)."""
    new_max = tl.maximum(row_max, tl.max(s, 1))
    # for a row without a key so far: -inf - (-inf) is NaN
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
    heads, tiles, parts, dense_parts, dense_programs, slots, queries, first, keys, all_keys, prefix,
    cells, scale,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, WIDE: tl.constexpr, VALUE_WIDE: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, CELLS: tl.constexpr, UNIT: tl.constexpr,
    BY_TILE: tl.constexpr, BOOLEAN: tl.constexpr, LOWEST: tl.constexpr, DENSE: tl.constexpr,
):  # fmt: skip
    image, head, tile, part, dense = program_work(
        heads, tiles, parts, dense_parts, dense_programs, DENSE
    )
    slot = part * ROWS + tl.arange(0, ROWS)
    row = tile + slot + first
    if order is not None:  # not in a function: see `visible` about addresses that tensors give
        row = tl.load(order + tile * slots + slot, mask=slot < slots, other=0) + first
    if DENSE:
        row = tl.where(dense, slot, row)
    valid = are_queries(slot, weight, tile, dense, slots, first, DENSE)
    if DENSE:  # leading queries see every key, and need no summary
        keys = tl.where(dense, all_keys, keys)
        cells_seen = tl.where(dense, 0, cells)
    else:
        cells_seen = cells
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
        key, present = key_tokens(place, chosen, held, table, dense, keys, prefix, UNIT, DENSE)
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
        for start in range(0, cells_seen, CELLS):
            cell = start + tl.arange(0, CELLS)
            present = cell < cells
            keys_at = pooled_k + at_rows(cell, DIM, WIDE)
            key_rows = tl.load(keys_at, mask=within(present, DIM, WIDE), other=0.0)
            s = product(query, tl.trans(key_rows)) * (scale * LOG2E)
            bias_row = tl.where(valid, tile, 0) if BY_TILE else row - first
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
    # a finite value for rows without a key, so that their recomputed weights are zero
    sums_at = lse + pair * queries + row
    tl.store(sums_at, tl.where(empty, 0.0, row_max + tl.log2(row_sum)), mask=valid)


@triton.jit
def gradients_of(s, query, grad, key_rows, value_rows, lse, delta, scale, acc):
    """Gradients of the logits, keys and values of some keys, and the queries' sum so far.

    dS = P (dP - rowsum(dO O)): FlashAttention, arXiv 2205.14135, appendix B.2.
    """
    p = tl.exp2(s - lse[:, None])
    to_v = product(tl.trans(p.to(grad.dtype)), grad)
    dp = product(grad, tl.trans(value_rows))
    ds = p * (dp - delta[:, None])
    ds_low = ds.to(query.dtype)
    to_k = product(tl.trans(ds_low), query) * scale
    acc = product(ds_low, key_rows, acc)
    return ds, to_k, to_v, acc


@triton.jit
def backward(
    q, k, v, pooled_k, pooled_v, out, lse, host, rows, order, weight, chosen, held, table,
    grad, to_q, to_k, to_v, to_pooled_k, to_pooled_v, to_host, to_rows,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, out_b, out_h, out_n, grad_b, grad_h, grad_n,
    to_q_b, to_q_h, to_q_n, to_k_b, to_k_h, to_k_n, to_v_b, to_v_h, to_v_n,
    host_b, host_h, host_m, host_n, rows_b, rows_h, rows_m, rows_g,
    to_host_b, to_host_h, to_host_m, to_host_n, to_rows_b, to_rows_h, to_rows_m, to_rows_g,
    chosen_b, chosen_h, chosen_t,
    heads, tiles, parts, dense_parts, dense_programs, slots, queries, first, keys, all_keys, prefix,
    cells, scale,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, WIDE: tl.constexpr, VALUE_WIDE: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, CELLS: tl.constexpr, UNIT: tl.constexpr,
    BY_TILE: tl.constexpr, TO_ROWS_BY_TILE: tl.constexpr, BOOLEAN: tl.constexpr,
    LOWEST: tl.constexpr, DENSE: tl.constexpr,
):  # fmt: skip
    image, head, tile, part, dense = program_work(
        heads, tiles, parts, dense_parts, dense_programs, DENSE
    )
    slot = part * ROWS + tl.arange(0, ROWS)
    row = tile + slot + first
    if order is not None:  # not in a function: see `visible` about addresses that tensors give
        row = tl.load(order + tile * slots + slot, mask=slot < slots, other=0) + first
    if DENSE:
        row = tl.where(dense, slot, row)
    valid = are_queries(slot, weight, tile, dense, slots, first, DENSE)
    if DENSE:  # leading queries see every key, and need no summary
        keys = tl.where(dense, all_keys, keys)
        cells_seen = tl.where(dense, 0, cells)
    else:
        cells_seen = cells
    query_mask, result_mask = within(valid, DIM, WIDE), within(valid, VALUE_DIM, VALUE_WIDE)
    queries_at = q + image * q_b + head * q_h + at_rows(row, q_n, WIDE)
    grads_at = grad + image * grad_b + head * grad_h + at_rows(row, grad_n, VALUE_WIDE)
    results_at = out + image * out_b + head * out_h + at_rows(row, out_n, VALUE_WIDE)
    query = tl.load(queries_at, mask=query_mask, other=0.0)
    grad_out = tl.load(grads_at, mask=result_mask, other=0.0)
    result = tl.load(results_at, mask=result_mask, other=0.0)
    pair = image * heads + head
    log_sum = tl.load(lse + pair * queries + row, mask=valid, other=0.0)
    delta = tl.sum(grad_out.to(tl.float32) * result.to(tl.float32), 1)
    k += image * k_b + head * k_h
    v += image * v_b + head * v_h
    if to_k is not None:
        to_k += image * to_k_b + head * to_k_h
        to_v += image * to_v_b + head * to_v_h
    chosen += image * chosen_b + head * chosen_h + tile * chosen_t
    if held is not None:
        held += image * chosen_b + head * chosen_h + tile * chosen_t

    acc = tl.zeros([ROWS, WIDE], tl.float32)
    for start in range(0, keys, KEYS):
        place = start + tl.arange(0, KEYS)
        key, present = key_tokens(place, chosen, held, table, dense, keys, prefix, UNIT, DENSE)
        key_mask, value_mask = within(present, DIM, WIDE), within(present, VALUE_DIM, VALUE_WIDE)
        pairs = valid[:, None] & present[None, :]
        key_rows = tl.load(k + at_rows(key, k_n, WIDE), mask=key_mask, other=0.0)
        value_rows = tl.load(v + at_rows(key, v_n, VALUE_WIDE), mask=value_mask, other=0.0)
        s = product(query, tl.trans(key_rows)) * (scale * LOG2E)
        if host is not None:
            offsets = image * host_b + head * host_h + row[:, None] * host_m + key[None, :] * host_n
            s += host_logits(host, offsets, pairs, BOOLEAN, LOWEST)
        s = tl.where(pairs, s, float("-inf"))
        ds, dk, dv, acc = gradients_of(
            s, query, grad_out, key_rows, value_rows, log_sum, delta, scale, acc
        )
        if to_k is not None:
            to_keys, to_values = at_rows(key, to_k_n, WIDE), at_rows(key, to_v_n, VALUE_WIDE)
            tl.atomic_add(to_k + to_keys, dk, mask=key_mask, sem="relaxed")
            tl.atomic_add(to_v + to_values, dv, mask=value_mask, sem="relaxed")
        if to_host is not None:
            offsets = row[:, None] * to_host_m + key[None, :] * to_host_n
            offsets += image * to_host_b + head * to_host_h
            tl.atomic_add(to_host + offsets, ds, mask=pairs, sem="relaxed")

    if rows is not None:
        pooled_k += pair * cells * DIM
        pooled_v += pair * cells * VALUE_DIM
        if to_pooled_k is not None:
            to_pooled_k += pair * cells * DIM
            to_pooled_v += pair * cells * VALUE_DIM
        bias_row = tl.where(valid, tile, 0) if BY_TILE else row - first
        to_row = tl.where(valid, tile, 0) if TO_ROWS_BY_TILE else row - first
        for start in range(0, cells_seen, CELLS):
            cell = start + tl.arange(0, CELLS)
            present = cell < cells
            key_mask = within(present, DIM, WIDE)
            value_mask = within(present, VALUE_DIM, VALUE_WIDE)
            pairs = valid[:, None] & present[None, :]
            keys_at, values_at = at_rows(cell, DIM, WIDE), at_rows(cell, VALUE_DIM, VALUE_WIDE)
            key_rows = tl.load(pooled_k + keys_at, mask=key_mask, other=0.0)
            value_rows = tl.load(pooled_v + values_at, mask=value_mask, other=0.0)
            s = product(query, tl.trans(key_rows)) * (scale * LOG2E)
            start_of_rows = image * rows_b + head * rows_h
            offsets = start_of_rows + bias_row[:, None] * rows_m + cell[None, :] * rows_g
            s = tl.where(pairs, s + cell_logits(rows, offsets, pairs), float("-inf"))
            ds, dk, dv, acc = gradients_of(
                s, query, grad_out, key_rows, value_rows, log_sum, delta, scale, acc
            )
            if to_pooled_k is not None:
                tl.atomic_add(to_pooled_k + keys_at, dk, mask=key_mask, sem="relaxed")
                tl.atomic_add(to_pooled_v + values_at, dv, mask=value_mask, sem="relaxed")
            if to_rows is not None:
                offsets = to_row[:, None] * to_rows_m + cell[None, :] * to_rows_g
                offsets += image * to_rows_b + head * to_rows_h
                tl.atomic_add(to_rows + offsets, ds, mask=pairs, sem="relaxed")

    gradients_at = to_q + image * to_q_b + head * to_q_h + at_rows(row, to_q_n, WIDE)
    tl.store(gradients_at, (acc * scale).to(to_q.dtype.element_ty), mask=query_mask)
