"""Gathers the keys of every query tile, then runs small dense attentions: real savings."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from sparsiattn.interception import dense_attention
from sparsiattn.kernel import Kernel
from sparsiattn.kernels.gathered import Operands, attend, is_lean
from sparsiattn.patterns import KeyBlocks, KeyLists, Pattern
from sparsiattn.site import AttentionInputs
from sparsiattn.summary import Summary

# Keys and values packed at a time, in elements: what is packed for a part is all the memory that
# this kernel needs beside operands and result.
PACKED = 1 << 22


class Gather(Kernel):
    """Key lists by gathering K and V per query tile; differentiable, never an N x N tensor.

    Without a host mask its memory is linear in the number of kept pairs. Cost follows the budget,
    so it wins where tiles are large and budgets small.
    """

    name = "gather"
    summary = "gathers each tile's keys, then dense attention on them (saves time with tiles)"

    def why_not(self, inputs: AttentionInputs, pattern: Pattern) -> list[str]:
        if not isinstance(pattern, KeyLists):
            return [f"needs key lists, got a {type(pattern).__name__} pattern"]
        if pattern.summary is not None and pattern.summary.per_query:
            return ["background keys differ between queries under this host mask"]
        return []

    def speed(self, inputs: AttentionInputs, pattern: Pattern) -> float:
        # fitted to the rows with planning of benchmarks/results/kernels-cpu.json
        assert isinstance(pattern, KeyLists)
        if pattern.tiles is None or pattern.tiles.size < 16:
            return 0.2
        keys = pattern.width + (pattern.summary.count if pattern.summary else 0)
        return 0.38 * inputs.n_keys / (keys + 300)

    def __call__(self, inputs: AttentionInputs, pattern: Pattern) -> Tensor:
        assert isinstance(pattern, KeyLists)
        if needs_grad(inputs) or not is_lean(inputs.q, inputs.dropout):
            patches = _attend(inputs, pattern)
            patches = (
                patches.squeeze(-2) if pattern.tiles is None else pattern.tiles.scatter(patches)
            )
            if not pattern.dense_rows:
                return patches
            return torch.cat([dense_rows(inputs, pattern.dense_rows), patches], dim=-2)
        b, h, n, _ = inputs.q.shape
        # laid out as torch's own attention does, so that the host's reshape copies nothing
        out = inputs.q.new_empty(b, n, h, inputs.v.shape[-1]).transpose(1, 2)
        for part in _parts(inputs):
            _fill(out[part], _part_of(inputs, part), _part_of(pattern, part))
        return out


def _fill(out: Tensor, inputs: AttentionInputs, pattern: KeyLists) -> None:
    """Writes the result of some images and heads, ``[B, H, Nq, Dv]``."""
    tiles, first = _attend(inputs, pattern), pattern.dense_rows
    if first:
        out[..., :first, :] = dense_rows(inputs, first)
    if pattern.tiles is None:
        out[..., first:, :] = tiles.squeeze(-2)
    elif pattern.tiles.even:
        pattern.tiles.view(out[..., first:, :]).copy_(pattern.tiles.split(tiles))
    else:
        out[..., first:, :] = pattern.tiles.scatter(tiles)


def needs_grad(inputs: AttentionInputs) -> bool:
    """Whether a backward pass will follow."""
    operands = (inputs.q, inputs.k, inputs.v, inputs.bias)
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in operands)


def _parts(inputs: AttentionInputs) -> list[tuple[slice, slice]]:
    """Images and heads few enough at a time that what is packed for them stays small."""
    batch, heads, rows = inputs.k.shape[:3]
    step = max(1, PACKED // (rows * (inputs.k.shape[-1] + inputs.v.shape[-1])))
    if step >= heads:
        whole = step // heads
        return [(slice(b, b + whole), slice(None)) for b in range(0, batch, whole)]
    return [
        (slice(b, b + 1), slice(h, h + step)) for b in range(batch) for h in range(0, heads, step)
    ]


def _part_of(whole: Any, part: tuple[slice, slice]) -> Any:
    """Some images and heads of `AttentionInputs`, of a pattern, or of its summary."""
    changed: dict[str, Any] = {}
    for field in fields(whole):
        value = getattr(whole, field.name)
        if isinstance(value, Summary):
            changed[field.name] = _part_of(value, part)
        elif isinstance(value, Tensor) and value.dim() == 4:
            batch, heads = (
                s if n > 1 else slice(None) for s, n in zip(part, value.shape[:2], strict=True)
            )
            changed[field.name] = value[batch, heads]
    return replace(whole, **changed)


def _attend(inputs: AttentionInputs, pattern: KeyLists) -> Tensor:
    """``[B, H, T, t, Dv]``."""
    patches, tiles = inputs.q[..., pattern.dense_rows :, :], pattern.tiles
    q = patches.unsqueeze(-2) if tiles is None else tiles.gather(patches)
    if isinstance(pattern, KeyBlocks) and pattern.blocks.even and inputs.bias is None:
        return attend(_by_block(q, inputs, pattern))
    operands, dead = _by_key(q, inputs, pattern)
    out = attend(operands)
    return out if dead is None else out.masked_fill(dead, 0.0)


def _by_key(
    q: Tensor, inputs: AttentionInputs, pattern: KeyLists
) -> tuple[Operands, Tensor | None]:
    """Rows of single keys, then those of the summary."""
    index, summary = pattern.index, pattern.summary
    k, v = inputs.k.unsqueeze(-2), inputs.v.unsqueeze(-2)
    if summary is not None:
        k, v = (torch.cat([x, summary.pool(x.squeeze(-2)).unsqueeze(-2)], -3) for x in (k, v))
        cells = torch.arange(summary.count, device=index.device) + inputs.n_keys
        index = torch.cat([index, cells.expand(*index.shape[:-1], -1)], dim=-1)
    bias, dead = _bias(inputs, pattern)
    return Operands(q, k, v, index, bias, inputs.scale, inputs.dropout), dead


def _by_block(q: Tensor, inputs: AttentionInputs, pattern: KeyBlocks) -> Operands:
    """Rows of whole blocks. Prefix and summary keys fill some more blocks, which every tile sees;
    what is left over in these and in the last block of each list is masked."""
    size, chosen, summary = pattern.blocks.size, pattern.chosen, pattern.summary
    cells = 0 if summary is None else summary.count
    extra = pattern.prefix + cells
    more = -(-extra // size)
    k, v = (_packed(x, pattern, more * size - extra) for x in (inputs.k, inputs.v))
    rest = pattern.keys - pattern.prefix - (chosen.shape[-1] - 1) * size
    inf = float("-inf")
    masked = [0.0] * rest + [inf] * (size - rest) + [0.0] * pattern.prefix
    ends = [q.new_tensor(masked).expand(*chosen.shape[:-1], 1, -1)]
    if summary is not None:
        ends.append(_summary_rows(pattern, summary).to(q.dtype))
    ends.append(q.new_full((more * size - extra,), inf).expand(*chosen.shape[:-1], 1, -1))
    always = torch.arange(more, device=chosen.device) + pattern.blocks.count
    index = torch.cat([chosen, always.expand(*chosen.shape[:-1], -1)], dim=-1)
    lead = torch.broadcast_shapes(*(end.shape[:-1] for end in ends))
    bias = torch.cat([end.expand(*lead, -1) for end in ends], dim=-1)
    return Operands(q, k, v, index, bias, inputs.scale, inputs.dropout)


def _packed(x: Tensor, pattern: KeyBlocks, unused: int) -> Tensor:
    """``[B, H, N, D]`` block by block, ``[B, H, U, size, D]``: the patches, then prefix and summary
    keys, with zeros to fill the last block."""
    blocks, summary, patches = pattern.blocks, pattern.summary, x[..., pattern.prefix :, :]
    extra = [x[..., : pattern.prefix, :]] + ([] if summary is None else [summary.pool(x)])
    extra.append(x.new_zeros(*x.shape[:2], unused, x.shape[-1]))
    last = torch.cat(extra, dim=-2).unflatten(-2, (-1, blocks.size))
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return torch.cat([blocks.gather(patches), last], dim=-3)
    units = blocks.count + last.shape[-3]
    out = x.new_empty(*x.shape[:2], units, blocks.size, x.shape[-1])
    blocks.split(out[:, :, : blocks.count]).copy_(blocks.view(patches))
    out[:, :, blocks.count :] = last
    return out


def _bias(inputs: AttentionInputs, pattern: KeyLists) -> tuple[Tensor | None, Tensor | None]:
    """Logits to add to the last columns, ``[B|1, H|1, T, t|1, G]`` or all of them, ``[..., K +
    G]``, and the queries left without a key, ``[B|1, H|1, T, t|1, 1]``."""
    summary, host = pattern.summary, _host_rows(inputs, pattern)
    rows = None if summary is None else _summary_rows(pattern, summary)
    if host is None:
        return rows, None
    if rows is not None:
        wide = torch.broadcast_shapes(host.shape[:-1], rows.shape[:-1])
        host = torch.cat([host.expand(*wide, -1), rows.to(host.dtype).expand(*wide, -1)], -1)
    dead = (host == float("-inf")).all(-1, keepdim=True)
    return host.masked_fill(dead, 0.0), dead


def _summary_rows(pattern: KeyLists, summary: Summary) -> Tensor:
    """``[B|1, H|1, T, t|1, G]``."""
    tiles = pattern.tiles
    if tiles is not None and summary.bias.shape[-2] != tiles.count:
        return tiles.gather(summary.bias)
    return summary.bias.unsqueeze(-2)


def _host_rows(inputs: AttentionInputs, pattern: KeyLists) -> Tensor | None:
    """The host's mask at every tile's keys, ``[B, H, T, t|1, K]``, in the type of the queries."""
    bias, tiles, index = _hardened(inputs), pattern.tiles, pattern.index
    if bias is None:
        return None
    if bias.shape[-2] == 1:
        rows = bias.unsqueeze(-3)
    else:
        patches = bias[..., pattern.dense_rows :, :]
        rows = patches.unsqueeze(-2) if tiles is None else tiles.gather(patches)
    lead = (*inputs.q.shape[:2], index.shape[-2], rows.shape[-2])
    keys = index.unsqueeze(-2).expand(*lead, -1)
    found = rows.expand(*lead, -1).gather(-1, keys)
    if found.dtype == torch.bool:
        zero = torch.zeros_like(found, dtype=inputs.q.dtype)
        return zero.masked_fill(~found, float("-inf"))
    return found.to(inputs.q.dtype)


def _hardened(inputs: AttentionInputs) -> Tensor | None:
    """The host's mask with keys it all but forbids (Swin's -100) forbidden: a tile's list may hold
    only such keys for one of its queries."""
    bias, allowed = inputs.bias, inputs.allowed()
    if bias is None or allowed is None or bias.dtype == torch.bool:
        return bias
    return bias.masked_fill(~allowed, float("-inf"))


def dense_rows(inputs: AttentionInputs, count: int) -> Tensor:
    """Leading queries over every key, ``[B, H, count, Dv]``."""
    bias = inputs.bias
    if bias is not None and bias.shape[-2] > 1:
        bias = bias[..., :count, :]
    q = inputs.q[..., :count, :]
    if bias is not None and bias.dtype != torch.bool:
        bias = bias.to(q.dtype)
    return dense_attention(q, inputs.k, inputs.v, bias, inputs.dropout, scale=inputs.scale)
