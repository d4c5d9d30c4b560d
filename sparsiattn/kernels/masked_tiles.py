"""Attention over the blocks of a `BlockMask`, bucket by bucket."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsiattn.attention.block_masks import BlockMask
from sparsiattn.attention.inputs import AttentionInputs
from sparsiattn.kernels.cost import CallShape, Work
from sparsiattn.kernels.gather_ops import GatherOperands, attend


def refusals(inputs: AttentionInputs, pattern: BlockMask) -> list[str]:
    found = []
    if inputs.bias is not None:
        found.append("block masks take no host mask beside them; join it with the mask first")
    if pattern.summary is not None:
        found.append("block masks have no background keys; use background=None")
    return found


def work(inputs: AttentionInputs, pattern: BlockMask) -> Work:
    call = CallShape.of(inputs)
    pairs = pattern.computed_macs(1)
    rows = sum(len(b.tiles) * b.index.shape[-1] for b in pattern.buckets) * pattern.block
    biases = call.batch * call.heads * sum(b.bias.shape[-3:].numel() for b in pattern.buckets)
    moved = call.rows_bytes(rows + call.keys) + 3 * biases * call.dtype.itemsize
    return call.attending(pairs, calls=20.0 + 20.0 * len(pattern.buckets), moved=moved)


def attend_blocks(inputs: AttentionInputs, pattern: BlockMask) -> Tensor:
    """``[B, H, Nq, Dv]``; rows without a key are zero."""
    q, k, v = (_placed(x, pattern.order) for x in (inputs.q, inputs.k, inputs.v))
    q = _units(q, pattern.tile)
    k, v = (_units(x, pattern.block) for x in (k, v))
    tiles = q.new_zeros(*q.shape[:-1], v.shape[-1])
    for bucket in pattern.buckets:
        rows = q.index_select(2, bucket.tiles)
        out = attend(
            GatherOperands(rows, k, v, bucket.index, bucket.bias, inputs.scale, inputs.dropout)
        ).masked_fill(bucket.dead, 0.0)
        tiles = tiles.to(out.dtype).index_copy(2, bucket.tiles, out)
    found = tiles.flatten(2, 3)[:, :, : pattern.n_queries]
    return found if pattern.order is None else _placed(found, torch.argsort(pattern.order))


def _placed(x: Tensor, order: Tensor | None) -> Tensor:
    return x if order is None else x.index_select(-2, order)


def _units(x: Tensor, size: int) -> Tensor:
    """``[B, H, N, D]`` to ``[B, H, U, size, D]``, zeros behind the last token."""
    padded = F.pad(x, (0, 0, 0, -x.shape[-2] % size))
    units: Tensor = padded.unflatten(-2, (-1, size))
    return units
