"""Gradients of keys and values without atomic additions: the same in every run.

One program per step of keys walks through all queries in the order of tiles, skips those that list
none of its keys, and adds up what the others send back. Which tile lists which key is a table that
each backward pass makes once (`membership`). Summary keys, which every tile sees, are keys like
others, with a bias of their own.

Imports triton.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsiattn.kernels._triton.kernels import (
    LOG2E,
    at_rows,
    cell_logits,
    host_logits,
    product,
    within,
)
from sparsiattn.kernels._triton.launch import (
    KeyListOperands,
    Launch,
    backward_sizes,
    padded,
    readable_mask,
    strides,
)

MOST_KEYS = 32
"""Keys of a program at most."""

MOST_ROWS = 32
"""Queries of a step at most, in single precision."""


def membership(call: KeyListOperands) -> Tensor:
    """Which keys every tile lists, uint8 ``[B|1, H|1, T, Nk]``."""
    chosen, keys = call.chosen, call.k.shape[-2]
    if call.table is None:
        listed, present = chosen[..., : call.keys], None
    else:
        size = call.table.shape[1]
        slot = torch.arange(size, device=chosen.device)
        listed = (call.table[chosen] + call.prefix).flatten(-2)
        if call.held is None:
            place = torch.arange(listed.shape[-1], device=chosen.device)
            present = (place < call.keys - call.prefix).expand(listed.shape)
        else:
            present = (slot < call.held.unsqueeze(-1)).flatten(-2)
    # places without a key write to a column of their own
    listed = listed if present is None else listed.masked_fill(~present, keys)
    table = chosen.new_zeros(*chosen.shape[:-1], keys + 1, dtype=torch.uint8)
    table.scatter_(-1, listed, 1)
    table[..., : call.prefix] = 1
    return table[..., :keys].contiguous()


@triton.jit
def from_queries(
    to_key, to_value, key_rows, value_rows, key, row, valid, bias, allowed,
    q, out_grad, lse, delta, host, q_n, grad_n, host_m, host_n, scale,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, WIDE: tl.constexpr, VALUE_WIDE: tl.constexpr,
    BOOLEAN: tl.constexpr, LOWEST: tl.constexpr,
):  # fmt: skip
    """Add what some queries send back to some keys, as `gradients_of` of the other kernel."""
    queries_at = q + at_rows(row, q_n, WIDE)
    query = tl.load(queries_at, mask=within(valid, DIM, WIDE), other=0.0)
    grads_at = out_grad + at_rows(row, grad_n, VALUE_WIDE)
    grad = tl.load(grads_at, mask=within(valid, VALUE_DIM, VALUE_WIDE), other=0.0)
    s = product(query, tl.trans(key_rows)) * (scale * LOG2E) + bias
    if host is not None:
        offsets = row[:, None] * host_m + key[None, :] * host_n
        s += host_logits(host, offsets, allowed, BOOLEAN, LOWEST)
    s = tl.where(allowed, s, float("-inf"))
    log_sum = tl.load(lse + row, mask=valid, other=0.0)
    p = tl.exp2(s - log_sum[:, None])
    to_value = product(tl.trans(p.to(grad.dtype)), grad, to_value)
    dp = product(grad, tl.trans(value_rows))
    ds = p * (dp - tl.load(delta + row, mask=valid, other=0.0)[:, None])
    return product(tl.trans(ds.to(query.dtype)), query, to_key), to_value


@triton.jit
def key_gradients(
    q, k, v, lse, delta, host, rows, order, weight, member, grad, to_k, to_v,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, grad_b, grad_h, grad_n,
    host_b, host_h, host_m, host_n, rows_b, rows_h, rows_m, rows_g, member_b, member_h, member_t,
    heads, chunks, places, slots, queries, first, keys, scale,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, WIDE: tl.constexpr, VALUE_WIDE: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, BY_TILE: tl.constexpr, BOOLEAN: tl.constexpr,
    LOWEST: tl.constexpr, DENSE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    pair = program // chunks
    image, head = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    pair = image * heads + head
    key = (program % chunks) * KEYS + tl.arange(0, KEYS)
    present = key < keys
    key_mask, value_mask = within(present, DIM, WIDE), within(present, VALUE_DIM, VALUE_WIDE)
    keys_at = k + image * k_b + head * k_h + at_rows(key.to(tl.int64), k_n, WIDE)
    values_at = v + image * v_b + head * v_h + at_rows(key.to(tl.int64), v_n, VALUE_WIDE)
    key_rows = tl.load(keys_at, mask=key_mask, other=0.0)
    value_rows = tl.load(values_at, mask=value_mask, other=0.0)
    q += image * q_b + head * q_h
    grad += image * grad_b + head * grad_h
    lse += pair * queries
    delta += pair * queries
    if host is not None:
        host += image * host_b + head * host_h
    if rows is not None:
        rows += image * rows_b + head * rows_h
    if member is not None:
        member += image * member_b + head * member_h

    to_key = tl.zeros([KEYS, WIDE], tl.float32)
    to_value = tl.zeros([KEYS, VALUE_WIDE], tl.float32)
    if DENSE:  # leading queries see every key
        for start in range(0, first, ROWS):
            row = (start + tl.arange(0, ROWS)).to(tl.int64)
            valid = row < first
            allowed = valid[:, None] & present[None, :]
            to_key, to_value = from_queries(
                to_key, to_value, key_rows, value_rows, key, row, valid, 0.0, allowed,
                q, grad, lse, delta, host, q_n, grad_n, host_m, host_n, scale,
                DIM, VALUE_DIM, WIDE, VALUE_WIDE, BOOLEAN, LOWEST,
            )  # fmt: skip
    for start in range(0, places, ROWS):
        place = start + tl.arange(0, ROWS)
        valid, tile = place < places, place // slots
        if weight is not None:  # a slot that repeats a query
            valid = valid & (tl.load(weight + place, mask=valid, other=0.0) > 0.0)
        token = place.to(tl.int64)
        if order is not None:
            token = tl.load(order + place, mask=valid, other=0)
        allowed = valid[:, None] & present[None, :]
        if member is not None:
            listed_at = member + tile[:, None].to(tl.int64) * member_t + key[None, :]
            allowed = allowed & (tl.load(listed_at, mask=allowed, other=0) > 0)
        if tl.max(allowed.to(tl.int32)) > 0:
            bias = 0.0
            if rows is not None:
                bias_row = tile.to(tl.int64) if BY_TILE else token
                offsets = bias_row[:, None] * rows_m + key[None, :] * rows_g
                bias = cell_logits(rows, offsets, allowed)
            to_key, to_value = from_queries(
                to_key, to_value, key_rows, value_rows, key, token + first, valid, bias, allowed,
                q, grad, lse, delta, host, q_n, grad_n, host_m, host_n, scale,
                DIM, VALUE_DIM, WIDE, VALUE_WIDE, BOOLEAN, LOWEST,
            )  # fmt: skip

    to_keys = to_k + pair * keys * DIM + at_rows(key.to(tl.int64), DIM, WIDE)
    tl.store(to_keys, (to_key * scale).to(to_k.dtype.element_ty), mask=key_mask)
    to_values = to_v + pair * keys * VALUE_DIM + at_rows(key.to(tl.int64), VALUE_DIM, VALUE_WIDE)
    tl.store(to_values, to_value.to(to_v.dtype.element_ty), mask=value_mask)


AXES = {"q": "bhn", "k": "bhn", "v": "bhn", "grad": "bhn", "host": "bhmn", "rows": "bhmg"}


def of_keys(
    call: KeyListOperands, lse: Tensor, delta: Tensor, grad: Tensor, member: Tensor,
    to_k: Tensor, to_v: Tensor,
) -> Launch:  # fmt: skip
    """The launch for the host's own keys.

    Args:
        call: The operands.
        lse: The log-sum-exp of each row.
        delta: The sum over each row of the result times its gradient, ``[B, H, P + n]``.
        grad: The gradient of the result.
        member: The table of `membership`.
        to_k: Receives the gradient of k, contiguous.
        to_v: Receives the gradient of v, contiguous.
    """
    tensors = {"k": call.k, "v": call.v, "host": call.host, "rows": None, "member": member}
    return _launch(call, {**tensors, **_shared(call, lse, delta, grad, to_k, to_v)}, call.first)


def of_cells(
    call: KeyListOperands, lse: Tensor, delta: Tensor, grad: Tensor, to_k: Tensor, to_v: Tensor
) -> Launch:
    """The launch for the summary keys, with arguments as of `of_keys`."""
    tensors = {"k": call.pooled_k, "v": call.pooled_v, "host": None, "rows": call.rows}
    shared = _shared(call, lse, delta, grad, to_k, to_v)
    return _launch(call, {**tensors, "member": None, **shared}, 0)


def _shared(
    call: KeyListOperands, lse: Tensor, delta: Tensor, grad: Tensor, to_k: Tensor, to_v: Tensor
) -> dict[str, Any]:
    results = {"lse": lse, "delta": delta, "grad": grad, "to_k": to_k, "to_v": to_v}
    return {"q": call.q, "order": call.order, "weight": call.weight, **results}


def _launch(call: KeyListOperands, tensors: dict[str, Any], dense_queries: int) -> Launch:
    sizes, keys = backward_sizes(call), tensors["k"].shape[-2]
    # with more keys at a time, registers spill, and fewer queries can be skipped
    step = min(sizes.keys, MOST_KEYS, padded(max(1, keys)))
    rows = min(sizes.rows, MOST_ROWS) if call.q.element_size() == 4 else sizes.rows
    host, tiles = tensors["host"], call.chosen.shape[-2]
    places = tiles * call.slots
    pairs, chunks = call.q.shape[0] * call.q.shape[1], -(-keys // step)
    arguments = {
        **tensors,
        "host": readable_mask(host),
        "heads": call.q.shape[1],
        "chunks": chunks,
        "places": places,
        "slots": call.slots,
        "queries": call.queries,
        "first": call.first,
        "keys": keys,
        "scale": call.scale,
        "DIM": call.q.shape[-1],
        "VALUE_DIM": call.v.shape[-1],
        "WIDE": padded(call.q.shape[-1]),
        "VALUE_WIDE": padded(call.v.shape[-1]),
        "ROWS": rows,
        "KEYS": step,
        "BY_TILE": tensors["rows"] is not None and tensors["rows"].shape[-2] == tiles,
        "BOOLEAN": host is not None and host.dtype == torch.bool,
        "LOWEST": call.lowest,
        "DENSE": dense_queries > 0,
    }
    for name, axes in (*AXES.items(), ("member", "bht")):
        arguments.update(strides(name, arguments[name], axes))
    return Launch(key_gradients, pairs * chunks, arguments, sizes.warps, sizes.stages)
