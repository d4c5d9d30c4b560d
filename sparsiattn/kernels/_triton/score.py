"""The kernels `vote` and `rank`: the keys that the queries of a tile attend to most.

A voter is the mean of a few neighbouring queries of a tile, its vote for a key is its attention
weight, and a key is scored by its largest vote (see `sparsiattn.attention.top_logits.TopLogits`).
Logits and votes are float32 whatever the dtype of the operands. Of equal votes the first keys are
taken, and lists are in ascending order, as in compiled code on a CPU.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from sparsiattn.kernels._triton.kernels import LOG2E, at_rows, product, within
from sparsiattn.kernels._triton.launch import FEWEST, Launch, padded, strides

ROWS, KEYS = 64, 64
"""Voters of a program, and keys of a step, of `vote`."""


@triton.jit
def voter_means(
    q, q_n, order, held, voter, valid, slots, first,
    DIM: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The mean query of every voter, ``[ROWS, WIDE]`` float32."""
    size = tl.load(held + voter, mask=valid, other=0)
    total = tl.zeros([ROWS, WIDE], tl.float32)
    for slot in range(slots):
        present = slot < size
        token = tl.load(order + voter * slots + slot, mask=present, other=0) + first
        mask = within(present, DIM, WIDE)
        total += tl.load(q + at_rows(token, q_n, WIDE), mask=mask, other=0.0).to(tl.float32)
    return total / tl.maximum(size, 1).to(tl.float32)[:, None]


@triton.jit
def voter_logits(
    high, low, k, k_n, start, keys, scale,
    DIM: tl.constexpr, WIDE: tl.constexpr, KEYS: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Logits in base 2 of the voters and the keys from ``start`` on, ``[ROWS, KEYS]``."""
    key = start + tl.arange(0, KEYS)
    present = key < keys
    key_rows = tl.load(k + at_rows(key, k_n, WIDE), mask=within(present, DIM, WIDE), other=0.0)
    s = product(high, tl.trans(key_rows))
    if SPLIT:
        s = product(low, tl.trans(key_rows), s)
    return tl.where(present[None, :], s * (scale * LOG2E), float("-inf"))


@triton.jit
def vote(
    q, k, order, held, votes,
    q_b, q_h, q_n, k_b, k_h, k_n,
    heads, tiles, groups, voters, slots, first, keys, columns, scale,
    DIM: tl.constexpr, WIDE: tl.constexpr, TILES: tl.constexpr, VOTERS: tl.constexpr,
    KEYS: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """One program computes the votes of a few tiles of one head for every key.

    It walks through the keys twice: for the sum of each voter's weights, then for the votes. Means
    of half precision are split into two numbers of that precision, which loses next to nothing.
    """
    program = tl.program_id(0)
    group, pair = program % groups, (program // groups).to(tl.int64)
    image, head = pair // heads, pair % heads
    q += image * q_b + head * q_h
    k += image * k_b + head * k_h
    row = tl.arange(0, TILES * VOTERS)
    tile, member = group * TILES + row // VOTERS, row % VOTERS
    valid = (member < voters) & (tile < tiles)
    mean = voter_means(
        q, q_n, order, held, tile * voters + member, valid, slots, first, DIM, WIDE, TILES * VOTERS
    )
    high = mean.to(k.dtype.element_ty)
    low = (mean - high.to(tl.float32)).to(k.dtype.element_ty)

    row_max = tl.full([TILES * VOTERS], float("-inf"), tl.float32)
    row_sum = tl.zeros([TILES * VOTERS], tl.float32)
    for start in range(0, keys, KEYS):
        s = voter_logits(high, low, k, k_n, start, keys, scale, DIM, WIDE, KEYS, SPLIT)
        new_max = tl.maximum(row_max, tl.max(s, 1))
        row_sum = row_sum * tl.exp2(row_max - new_max) + tl.sum(tl.exp2(s - new_max[:, None]), 1)
        row_max = new_max
    # zero weight for rows that are no voters
    log_sum = tl.where(valid, row_max + tl.log2(row_sum), float("inf"))

    tile = group * TILES + tl.arange(0, TILES)
    rows_at = votes + (pair * tiles + tile)[:, None] * columns
    for start in range(0, keys, KEYS):
        s = voter_logits(high, low, k, k_n, start, keys, scale, DIM, WIDE, KEYS, SPLIT)
        weight = tl.reshape(tl.exp2(s - log_sum[:, None]), [TILES, VOTERS, KEYS])
        key = start + tl.arange(0, KEYS)
        mask = (tile < tiles)[:, None] & (key < keys)[None, :]
        tl.store(rows_at + key[None, :], tl.max(weight, 1), mask=mask)


@triton.jit
def rank(
    votes, index, cells, total, bias,
    columns, patches, keep, prefix, groups,
    COLUMNS: tl.constexpr, PREFIX: tl.constexpr, CELLS: tl.constexpr,
):  # fmt: skip
    """One program makes the list of one tile: the prefix keys, then those of the largest votes.

    The smallest vote of the list is found bit by bit: votes are not negative, so they are in the
    same order as their bits. The search ends early once as many votes as wanted are above.
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    present = column < patches
    scores = tl.load(votes + row * columns + prefix + column, mask=present, other=0.0)
    bits = tl.where(present, scores.to(tl.int32, bitcast=True), -1)
    least, above, bit = 0, patches, 1 << 30
    while (bit > 0) & (above != keep):
        candidate = least | bit
        count = tl.sum((bits >= candidate).to(tl.int32), 0)
        least = tl.where(count >= keep, candidate, least)
        above = tl.where(count >= keep, count, above)
        bit = bit >> 1

    larger = bits > least
    missing = keep - tl.sum(larger.to(tl.int32), 0)
    equal = bits == least
    kept = larger | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= missing))
    place = tl.cumsum(kept.to(tl.int32), 0) - 1
    index += row * (prefix + keep)
    tl.store(index + prefix + place, (column + prefix).to(tl.int64), mask=kept)
    leading = tl.arange(0, PREFIX)
    tl.store(index + leading, leading.to(tl.int64), mask=leading < prefix)

    if bias is not None:
        cell = tl.load(cells + prefix + column, mask=present, other=0).to(tl.int32)
        group = tl.arange(0, CELLS)
        exists = group < groups
        rest = tl.load(total + group, mask=exists, other=0.0)
        rest -= tl.histogram(cell, CELLS, mask=kept).to(tl.float32)
        logs = tl.where(rest > 0.5, tl.log(tl.maximum(rest, 1.0)), float("-inf"))
        tl.store(bias + row * groups + group, logs, mask=exists)


def vote_launch(
    q: Tensor, k: Tensor, order: Tensor, held: Tensor, votes: Tensor, first: int, scale: float
) -> Launch:
    """The launch of `vote`.

    Args:
        q: Queries ``[B, H, N, D]`` with contiguous rows.
        k: Keys ``[B, H, Nk, D]`` with contiguous rows.
        order: Patch queries of every voter, tile by tile, ``[T * m, s]``.
        held: How many of these are distinct, ``[T * m]``.
        votes: Receives the votes, ``[B, H, T, columns]`` float32 with at least Nk columns.
        first: Number of leading queries, which do not vote.
        scale: Factor of QK^T.
    """
    (batch, heads, keys, dim), (tiles, columns) = k.shape, votes.shape[2:]
    voters = order.shape[0] // tiles
    members = triton.next_power_of_2(voters)
    at_once = max(ROWS, members) // members
    groups = -(-tiles // at_once)
    arguments: dict[str, Any] = {
        "q": q, "k": k, "order": order, "held": held, "votes": votes,
        **strides("q", q, "bhn"), **strides("k", k, "bhn"),
        "heads": heads, "tiles": tiles, "groups": groups, "voters": voters,
        "slots": order.shape[1], "first": first, "keys": keys, "columns": columns, "scale": scale,
        "DIM": dim, "WIDE": padded(dim), "TILES": at_once, "VOTERS": members,
        "KEYS": KEYS if padded(dim) * k.element_size() <= 256 else KEYS // 2,
        "SPLIT": k.element_size() == 2,
    }  # fmt: skip
    stages = 3 if padded(dim) * k.element_size() <= 128 else 1
    # with fewer, wide rows would not fit the registers
    warps = 4 if k.element_size() == 2 and padded(dim) <= 128 else 8
    return Launch(vote, batch * heads * groups, arguments, warps=warps, stages=stages)


def rank_launch(
    votes: Tensor, index: Tensor, prefix: int, keys: int,
    cells: Tensor | None, total: Tensor | None, bias: Tensor | None,
) -> Launch:  # fmt: skip
    """The launch of `rank`.

    Args:
        votes: Votes of at least 0, ``[B, H, T, columns]``.
        index: Receives the lists, ``[B, H, T, K]``.
        prefix: Number of leading keys, which are in every list.
        keys: Number of keys, Nk.
        cells: Cell of every key, ``[Nk]``; None without a summary, as for the next two.
        total: Number of keys of every cell, ``[G]`` or longer.
        bias: Receives the log of how many keys of each cell a list leaves out, ``[B, H, T, G]``.
    """
    patches, groups = keys - prefix, 0 if bias is None else bias.shape[-1]
    width = max(128, triton.next_power_of_2(patches))
    arguments: dict[str, Any] = {
        "votes": votes, "index": index, "cells": cells, "total": total, "bias": bias,
        "columns": votes.shape[-1], "patches": patches, "keep": index.shape[-1] - prefix,
        "prefix": prefix, "groups": groups,
        "COLUMNS": width, "PREFIX": padded(max(FEWEST, prefix)), "CELLS": max(32, padded(groups)),
    }  # fmt: skip
    warps = min(16, max(4, width // 2048))
    return Launch(rank, index.shape[:3].numel(), arguments, warps=warps, stages=1)
