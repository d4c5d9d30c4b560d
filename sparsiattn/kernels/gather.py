"""The kernel `gather`: gathers the keys of every query tile and runs small dense attentions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from sparsiattn.attention import geometry
from sparsiattn.attention.background import Summary
from sparsiattn.attention.inputs import AttentionInputs
from sparsiattn.attention.key_lists import KeyBlocks, KeyLists
from sparsiattn.attention.pattern import Pattern
from sparsiattn.attention.sdpa import differentiable_attention
from sparsiattn.attention.top_logits import TopKeys
from sparsiattn.kernels.base import Kernel
from sparsiattn.kernels.cost import CallShape
from sparsiattn.kernels.gather_ops import (
    GatherOperands,
    attend,
    attend_in_scratch,
    can_buffer,
    tiles_at_once,
)
from sparsiattn.kernels.gathered_mask import GatheredMask
from sparsiattn.kernels.padding import list_count, row_keys, summary_count, tile_size
from sparsiattn.kernels.prices import Work
from sparsiattn.kernels.workspace import SCRATCH

# Keys and values packed at a time, in elements. This is all the memory that the kernel needs beside
# operands and result.
PACKED_AT_ONCE = 1 << 21

# Tensor operations of a call, and additional ones of each chunk of tiles.
FIXED_CALLS, CHUNK_CALLS = 40.0, 6.0

# Cost of the host's bias per pair, which is copied tile by tile, and of its mean over the keys of
# each summary cell, both in softmax entries.
BIAS_WORTH, MEANS_WORTH = 6.0, 20.0


class Gather(Kernel):
    """Key lists by gathering K and V per query tile; differentiable, without N x N tensors.

    Without a host mask, memory is linear in the number of kept pairs. The cost is proportional to
    the budget, so it is fast with large tiles and small budgets.
    """

    name = "gather"
    summary = "gathers each tile's keys, then dense attention on them (saves time with tiles)"

    def why_not(self, inputs: AttentionInputs, pattern: Pattern) -> list[str]:
        if isinstance(pattern, GatheredMask):
            return pattern.why_not_gather(inputs)
        if not isinstance(pattern, KeyLists):
            return [f"needs key lists, got a {type(pattern).__name__} pattern"]
        if pattern.summary is not None and pattern.summary.per_query:
            return ["the model's mask makes summary keys differ between queries"]
        return []

    def work(self, inputs: AttentionInputs, pattern: Pattern) -> Work:
        if isinstance(pattern, GatheredMask):
            return pattern.gather_work(inputs)
        assert isinstance(pattern, KeyLists)
        call, rows = CallShape.of(inputs), list_count(pattern)
        tile, keys = tile_size(pattern), row_keys(pattern)
        lists = call.batch * call.heads * rows
        chunks = lists / tiles_at_once(inputs.device, keys * (call.dim + call.value_dim + tile))
        work = call.attending(
            rows * tile * keys + pattern.dense_rows * call.keys,
            calls=FIXED_CALLS + CHUNK_CALLS * max(1.0, chunks),
            moved=call.rows_bytes(rows * keys + call.keys),
        )
        if inputs.bias is None or inputs.bias.shape[-2] == 1:
            return work
        each = BIAS_WORTH + (0.0 if pattern.summary is None else MEANS_WORTH)
        pairs = call.batch * call.heads * call.queries * call.keys
        return replace(work, logits=work.logits + each * pairs)

    def __call__(self, inputs: AttentionInputs, pattern: Pattern) -> Tensor:
        if isinstance(pattern, GatheredMask):
            return pattern.gather(inputs)
        assert isinstance(pattern, KeyLists)
        if isinstance(pattern, TopKeys):
            pattern = pattern.listed()
        if needs_grad(inputs) or not can_buffer(inputs.q, inputs.dropout):
            operands, dead = _operands(inputs, pattern)
            rows = attend(operands)
            if dead is not None:
                rows = rows.masked_fill(dead, 0.0)
            rows = rows.squeeze(-2) if pattern.tiles is None else pattern.tiles.scatter(rows)
            return with_dense_rows(rows, inputs, pattern)
        b, h, n, _ = inputs.q.shape
        # laid out as by torch's own attention, so that the host's reshape copies nothing
        out = inputs.q.new_empty(b, n, h, inputs.v.shape[-1]).transpose(1, 2)
        parts = _parts(inputs)
        if len(parts) == 1:
            _fill(out, inputs, pattern)
            return out
        for part in parts:
            _fill(out[part], _slice(inputs, part), _slice(pattern, part))
        return out


def _fill(out: Tensor, inputs: AttentionInputs, pattern: KeyLists) -> None:
    """Write the result of some images and heads, ``[B, H, Nq, Dv]``."""
    first = pattern.dense_rows
    operands, dead = _operands(inputs, pattern, SCRATCH.room)
    tiles = attend_in_scratch(operands)
    if dead is not None:
        tiles.masked_fill_(dead, 0.0)
    if first:
        out[..., :first, :] = dense_rows(_packed_inputs(inputs, operands), first)
    if pattern.tiles is None:
        out[..., first:, :] = tiles.squeeze(-2)
    elif pattern.tiles.even:
        pattern.tiles.view(out[..., first:, :]).copy_(pattern.tiles.split(tiles))
    else:
        out[..., first:, :] = pattern.tiles.scatter(tiles)


def _packed_inputs(inputs: AttentionInputs, operands: GatherOperands) -> AttentionInputs:
    """The inputs with the packed keys and values, which are still in the CPU cache.

    Their order does not matter for dense rows, which see all of them.
    """
    if operands.k.shape[-2] == 1:
        return inputs
    k, v = (x.flatten(2, 3)[:, :, : inputs.n_keys] for x in (operands.k, operands.v))
    return inputs.replace(k=k, v=v)


def needs_grad(inputs: AttentionInputs) -> bool:
    """Whether a backward pass will follow."""
    operands = (inputs.q, inputs.k, inputs.v, inputs.bias)
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in operands)


def _parts(inputs: AttentionInputs) -> list[tuple[slice, slice]]:
    """Slices over images and heads, small enough for the memory limit `PACKED_AT_ONCE`."""
    batch, heads, rows = inputs.k.shape[:3]
    step = max(1, PACKED_AT_ONCE // (rows * (inputs.k.shape[-1] + inputs.v.shape[-1])))
    if step >= heads:
        images = step // heads
        return [(slice(b, b + images), slice(None)) for b in range(0, batch, images)]
    even = -(-heads // -(-heads // step))
    return [
        (slice(b, b + 1), slice(h, h + even)) for b in range(batch) for h in range(0, heads, even)
    ]


def _slice(record: Any, part: tuple[slice, slice]) -> Any:
    """A slice over images and heads of `AttentionInputs`, a pattern, or its summary."""
    changes: dict[str, Any] = {}
    for field in fields(record):
        value = getattr(record, field.name)
        if isinstance(value, Summary):
            changes[field.name] = _slice(value, part)
        elif isinstance(value, Tensor) and value.dim() == 4:
            batch, heads = (
                s if n > 1 else slice(None) for s, n in zip(part, value.shape[:2], strict=True)
            )
            changes[field.name] = value[batch, heads]
    return replace(record, **changes)


Room = Callable[[str, tuple[int, ...], Tensor], Tensor]
"""The signature of `Scratch.room`."""


def _operands(
    inputs: AttentionInputs, pattern: KeyLists, room: Room | None = None
) -> tuple[GatherOperands, Tensor | None]:
    """The operands of `attend`, and the queries without any key, ``[B|1, H|1, T, t|1, 1]``."""
    patches, tiles = inputs.q[..., pattern.dense_rows :, :], pattern.tiles
    if tiles is None:
        q = patches.unsqueeze(-2)
    elif room is None or not tiles.even:
        q = tiles.gather(patches)
    else:
        q = room("q", (*patches.shape[:2], tiles.count, tiles.size, patches.shape[-1]), patches)
        tiles.split(q).copy_(tiles.view(patches))
    if isinstance(pattern, KeyBlocks) and pattern.blocks.even and inputs.bias is None:
        return _by_block(q, inputs, pattern, room), None
    return _by_key(q, inputs, pattern)


def _by_key(
    q: Tensor, inputs: AttentionInputs, pattern: KeyLists
) -> tuple[GatherOperands, Tensor | None]:
    """Operands whose units are single keys, summary keys last."""
    index, summary = pattern.index, pattern.summary
    k, v = inputs.k.unsqueeze(-2), inputs.v.unsqueeze(-2)
    if summary is not None:
        k, v = (torch.cat([x, summary.pool(x.squeeze(-2)).unsqueeze(-2)], -3) for x in (k, v))
        cells = torch.arange(summary.count, device=index.device) + inputs.n_keys
        index = torch.cat([index, cells.expand(*index.shape[:-1], -1)], dim=-1)
    bias, dead = _bias(inputs, pattern)
    return GatherOperands(q, k, v, index, bias, inputs.scale, inputs.dropout), dead


def _by_block(
    q: Tensor, inputs: AttentionInputs, pattern: KeyBlocks, room: Room | None
) -> GatherOperands:
    """Operands whose units are blocks.

    Prefix and summary keys go to extra blocks that every tile sees. Unused slots of these and of
    the last block of each list are masked.
    """
    blocks, chosen, summary, prefix = (
        pattern.blocks,
        pattern.chosen,
        pattern.summary,
        pattern.prefix,
    )
    size, cells = blocks.size, summary_count(pattern)
    last = pattern.keys - prefix - (chosen.shape[-1] - 1) * size
    extra = -(-(prefix + cells) // size)
    if room is None:
        k, v = (_packed(x, pattern, extra * size) for x in (inputs.k, inputs.v))
    else:
        k = _packed_into(room, "k", inputs.k, pattern, extra * size)
        v = _packed_into(room, "v", inputs.v, pattern, extra * size)
    units = geometry.table(torch.arange, blocks.count, blocks.count + extra, device=q.device)
    index = torch.cat([chosen, units.expand(*chosen.shape[:-1], -1)], dim=-1)
    bias = geometry.table(_end_bias, size, last, prefix, extra, q.dtype, device=q.device)
    if summary is None:
        bias = bias.expand(*chosen.shape[:-1], 1, -1)
    else:
        rows, start = summary_rows(pattern, summary), size + prefix
        parts = bias[:start], rows.to(q.dtype), bias[start + cells :]
        bias = torch.cat([part.expand(*rows.shape[:-1], -1) for part in parts], dim=-1)
    return GatherOperands(q, k, v, index, bias, inputs.scale, inputs.dropout)


def _end_bias(
    size: int, last: int, prefix: int, extra: int, dtype: torch.dtype, *, device: torch.device
) -> Tensor:
    """Minus infinity on unused slots, 0 elsewhere, ``[(1 + extra) * size]``.

    It covers the last chosen block, of which ``last`` keys are used, and the ``extra`` blocks that
    every tile sees.
    """
    bias = torch.full(((1 + extra) * size,), float("-inf"), dtype=dtype, device=device)
    bias[:last] = 0.0
    bias[size : size + prefix] = 0.0
    return bias


def _packed(x: Tensor, pattern: KeyBlocks, extra_rows: int) -> Tensor:
    """Rows ``[B, H, N, D]`` packed into blocks ``[B, H, U, size, D]``.

    The patches come first, then ``extra_rows`` rows: prefix keys, summary keys, and zeros.
    """
    blocks, prefix = pattern.blocks, x[..., : pattern.prefix, :]
    packed = blocks.gather(x[..., pattern.prefix :, :])
    means = _means(x, packed, pattern)
    unused = x.new_zeros(*x.shape[:2], extra_rows - prefix.shape[-2] - means.shape[-2], x.shape[-1])
    tail = torch.cat([prefix, means, unused], dim=-2).unflatten(-2, (-1, blocks.size))
    return torch.cat([packed, tail], dim=-3)


def _packed_into(room: Room, name: str, x: Tensor, pattern: KeyBlocks, extra_rows: int) -> Tensor:
    """`_packed` without gradients, into reused memory."""
    blocks, prefix, patches = pattern.blocks, pattern.prefix, x[..., pattern.prefix :, :]
    n = patches.shape[-2]
    flat = room(name, (*x.shape[:2], n + extra_rows, x.shape[-1]), x)
    packed = flat[:, :, :n].unflatten(-2, (blocks.count, blocks.size))
    blocks.split(packed).copy_(blocks.view(patches))
    means = _means(x, packed, pattern)
    used = n + prefix + means.shape[-2]
    flat[:, :, n : n + prefix] = x[..., :prefix, :]
    flat[:, :, n + prefix : used] = means
    flat[:, :, used:] = 0.0
    units: Tensor = flat.unflatten(-2, (-1, blocks.size))
    return units


def _means(x: Tensor, packed: Tensor, pattern: KeyBlocks) -> Tensor:
    """The summary's rows ``[B, H, G, D]``.

    They are computed from packed blocks ``[B, H, C, size, D]`` if each block lies in one cell.
    """
    summary, blocks = pattern.summary, pattern.blocks
    if summary is None:
        return x[..., :0, :]
    rows, columns = summary.parts
    if summary.allowed is not None or blocks.parts[0] % rows or blocks.parts[1] % columns:
        return summary.pool(x)
    sides = (rows, blocks.parts[0] // rows, columns, blocks.parts[1] // columns)
    means = packed.mean(-2).reshape(*x.shape[:2], *sides, x.shape[-1])
    pooled: Tensor = means.mean((-4, -2)).flatten(-3, -2)
    return pooled


def _bias(inputs: AttentionInputs, pattern: KeyLists) -> tuple[Tensor | None, Tensor | None]:
    """Logits to add, and the queries without any key.

    Returns:
        Logits for the last columns, ``[B|1, H|1, T, t|1, G]``, or for all, ``[..., K + G]``; and a
        boolean ``[B|1, H|1, T, t|1, 1]``, True for queries without a key.
    """
    summary, host = pattern.summary, _host_rows(inputs, pattern)
    rows = None if summary is None else summary_rows(pattern, summary)
    if host is None:
        return rows, None
    if rows is not None:
        lead = torch.broadcast_shapes(host.shape[:-1], rows.shape[:-1])
        host = torch.cat([host.expand(*lead, -1), rows.to(host.dtype).expand(*lead, -1)], -1)
    # dead rows are unmasked, so that neither softmax nor its gradient is NaN; callers zero them
    dead = (host == float("-inf")).all(-1, keepdim=True)
    return host.masked_fill(dead, 0.0), dead


def summary_rows(pattern: KeyLists, summary: Summary) -> Tensor:
    """Logits of the summary keys tile by tile, ``[B|1, H|1, T, t|1, G]``."""
    tiles = pattern.tiles
    if tiles is not None and summary.bias.shape[-2] != tiles.count:
        return tiles.gather(summary.bias)
    return summary.bias.unsqueeze(-2)


def _host_rows(inputs: AttentionInputs, pattern: KeyLists) -> Tensor | None:
    """The host's mask at every tile's keys, ``[B, H, T, t|1, K]``, in the dtype of the queries."""
    bias, tiles, index = _hard_mask(inputs), pattern.tiles, pattern.index
    if bias is None:
        return None
    if bias.shape[-2] == 1:
        rows = bias.unsqueeze(-3)
    else:
        patches = bias[..., pattern.dense_rows :, :]
        rows = patches.unsqueeze(-2) if tiles is None else tiles.gather(patches)
    lead = (*inputs.q.shape[:2], index.shape[-2], rows.shape[-2])
    listed = rows.expand(*lead, -1).gather(-1, index.unsqueeze(-2).expand(*lead, -1))
    if listed.dtype == torch.bool:
        zero = torch.zeros_like(listed, dtype=inputs.q.dtype)
        return zero.masked_fill(~listed, float("-inf"))
    return listed.to(inputs.q.dtype)


def _hard_mask(inputs: AttentionInputs) -> Tensor | None:
    """The host's mask with very low logits (Swin's -100) replaced by minus infinity.

    A tile's list may hold only such keys for one of its queries.
    """
    bias, allowed = inputs.bias, inputs.allowed()
    if bias is None or allowed is None or bias.dtype == torch.bool:
        return bias
    return bias.masked_fill(~allowed, float("-inf"))


def dense_rows(inputs: AttentionInputs, count: int) -> Tensor:
    """Dense attention of the leading queries, ``[B, H, count, Dv]``."""
    q, bias = inputs.q[..., :count, :], _hard_mask(inputs)
    if bias is not None and bias.shape[-2] > 1:
        bias = bias[..., :count, :]
    if bias is not None and bias.dtype != torch.bool:
        bias = bias.to(q.dtype)
    return differentiable_attention(q, inputs.k, inputs.v, bias, inputs.dropout, scale=inputs.scale)


def with_dense_rows(patches: Tensor, inputs: AttentionInputs, pattern: KeyLists) -> Tensor:
    """Prepend the result of the prefix queries to that of the patch queries ``[B, H, n, Dv]``."""
    if not pattern.dense_rows:
        return patches
    return torch.cat([dense_rows(inputs, pattern.dense_rows), patches], dim=-2)
