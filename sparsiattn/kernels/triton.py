"""Attention over key lists and key blocks in Triton, without gathering keys in memory."""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

from sparsiattn.attention.inputs import MASKED_BELOW, AttentionInputs
from sparsiattn.attention.key_lists import KeyBlocks, KeyLists
from sparsiattn.attention.pattern import Pattern
from sparsiattn.kernels import triton_plan
from sparsiattn.kernels._triton.ops import key_list_attention
from sparsiattn.kernels.base import Kernel
from sparsiattn.kernels.cost import CallShape
from sparsiattn.kernels.derivatives import transform_refusals, twice_differentiable
from sparsiattn.kernels.gpu_prices import OPERATOR_CALLS
from sparsiattn.kernels.padding import (
    list_count,
    slot_macs,
    summary_count,
    tile_size,
)
from sparsiattn.kernels.prices import Work
from sparsiattn.kernels.triton_plan import TRITON_DTYPES, WIDEST_HEAD

_INSTALLED = importlib.util.find_spec("triton") is not None
# triton reads this once, too; kernels then run (slowly) on the CPU, for tests
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_MOST_ROWS = 128
"""Queries of one program at most."""


class Triton(Kernel):
    """Key lists and key blocks without copies.

    Rows of K and V are read in place, queries through their tiles, with a running softmax
    (FlashAttention, arXiv 2205.14135). Differentiable, including the host's bias and the logits of
    the background. Tiles share keys, so the gradients of keys, values and biases are added
    atomically, in float32: their last bits differ between runs. Under
    `torch.use_deterministic_algorithms`, slower kernels without atomic additions compute them.
    Float32 operands are never computed in TF32.
    """

    name = "triton"
    summary = "key lists and blocks on a GPU, read in place (Triton, saves time and memory)"

    def why_unavailable(self) -> list[str]:
        if not _INSTALLED:
            return ["triton is not installed"]
        if not _INTERPRETED and not torch.cuda.is_available():
            return ["needs a CUDA device"]
        return []

    def why_not(self, inputs: AttentionInputs, pattern: Pattern) -> list[str]:
        reasons = self.why_unavailable()
        if not isinstance(pattern, KeyLists):
            reasons.append(f"needs key lists, got a {type(pattern).__name__} pattern")
        if pattern.summary is not None and pattern.summary.per_query:
            reasons.append("the model's mask makes summary keys differ between queries")
        return reasons + _operand_refusals(inputs)

    def not_ready(self, inputs: AttentionInputs, pattern: Pattern) -> list[str]:
        device = inputs.device.type
        if device in (*_devices(), "meta"):
            return []
        return [f"needs CUDA tensors, and the model is on {device}: move it to a GPU first"]

    def work(self, inputs: AttentionInputs, pattern: Pattern) -> Work:
        assert isinstance(pattern, KeyLists)
        call, tile, lists = CallShape.of(inputs), tile_size(pattern), list_count(pattern)
        each, slots = call.batch * call.heads, _slots(pattern) + summary_count(pattern)
        pairs = each * (lists * _padded(tile) * slots + pattern.dense_rows * call.keys)
        # every part of a tile reads the keys of its list again, and pooling reads all keys
        pooled = 0 if pattern.summary is None else call.keys
        moved = call.rows_bytes(lists * -(-tile // _MOST_ROWS) * slots + pooled)
        if inputs.bias is not None:
            moved += pairs * call.dtype.itemsize
        return Work(
            calls=OPERATOR_CALLS * (2 if pooled else 1),
            macs=pairs * (_padded(call.dim) + _padded(call.value_dim)),
            logits=pairs,
            bytes=moved,
            rows=each * call.queries,
        )

    def uncounted_macs(self, inputs: AttentionInputs, pattern: Pattern) -> int:
        assert isinstance(pattern, KeyLists)
        width = _padded(inputs.q.shape[-1]) + _padded(inputs.v.shape[-1])
        slots = _slots(pattern) + summary_count(pattern)
        tile = _padded(tile_size(pattern))
        part = min(tile, _MOST_ROWS)
        dense = -(-pattern.dense_rows // part) * part
        return slot_macs(inputs, pattern, slots, tile=tile, width=width, dense_rows=dense)

    def __call__(self, inputs: AttentionInputs, pattern: Pattern) -> Tensor:
        assert isinstance(pattern, KeyLists)
        tiles, summary = pattern.tiles, pattern.summary
        pooled: tuple[Tensor | None, ...] = (None, None)
        if summary is not None:
            pooled = triton_plan.pooled(summary, inputs.k, inputs.v)
        out: Tensor = key_list_attention(
            inputs.q,
            inputs.k,
            inputs.v,
            *pooled,
            None if inputs.bias is None else inputs.bias[(None,) * (4 - inputs.bias.dim())],
            None if summary is None else summary.bias,
            None if tiles is None else tiles.order,
            None if tiles is None or tiles.even else tiles.weight,
            *_lists(pattern),
            pattern.dense_rows,
            pattern.prefix if isinstance(pattern, KeyBlocks) else 0,
            _slots(pattern),
            inputs.scale,
            None if inputs.site.bias == "bias" else MASKED_BELOW,
        )[0]
        return twice_differentiable(self.name, out, inputs, pattern)


def _devices() -> tuple[str, ...]:
    return ("cuda", "cpu") if _INTERPRETED else ("cuda",)


def _operand_refusals(inputs: AttentionInputs) -> list[str]:
    reasons, q, k, v = [], inputs.q, inputs.k, inputs.v
    # after a dry run on meta tensors, the model may move to a GPU
    if q.device.type not in (*_devices(), "meta"):
        reasons.append(f"needs CUDA tensors, got {q.device.type}")
    if q.dtype not in TRITON_DTYPES or len({q.dtype, k.dtype, v.dtype}) > 1:
        reasons.append(
            "needs q, k and v of the same dtype, float32, float16 or bfloat16, got "
            f"{q.dtype}, {k.dtype} and {v.dtype}"
        )
    if max(q.shape[-1], v.shape[-1]) > WIDEST_HEAD:
        reasons.append(f"needs head dims up to {WIDEST_HEAD}, got {q.shape[-1]} and {v.shape[-1]}")
    if inputs.dropout:
        reasons.append("does not support dropout")
    reasons += transform_refusals()
    return reasons


def _lists(pattern: KeyLists) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The key lists in the form that the operator takes.

    Returns:
        Keys or blocks of every tile, ``[B|1, H|1, T, C]``; the number of keys used of each of these
        blocks, None if all but the last are complete; and the keys of every block, ``[U, g]``.
    """
    if not isinstance(pattern, KeyBlocks):
        return pattern.index, None, None
    blocks, chosen = pattern.blocks, pattern.chosen
    if blocks.even:
        return chosen, None, blocks.order
    sizes = (blocks.weight > 0).sum(-1)[chosen]
    missing = pattern.keys - pattern.prefix - (sizes.cumsum(-1) - sizes)
    return chosen, sizes.minimum(missing.clamp_min(0)), blocks.order


def _slots(pattern: KeyLists) -> int:
    """Number of positions in every list: its keys, or all slots of its blocks if these differ."""
    if isinstance(pattern, KeyBlocks) and not pattern.blocks.even:
        return pattern.prefix + pattern.chosen.shape[-1] * pattern.blocks.size
    return pattern.width


def _padded(size: int) -> int:
    """The size, padded to a power of two of at least 16, as the kernel computes it."""
    return max(16, 1 << (size - 1).bit_length())
