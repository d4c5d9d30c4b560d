"""Attention over key lists and key blocks in Triton: on a GPU, nothing is gathered in memory."""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

from sparsiattn.attention.inputs import MASKED_BELOW, AttentionInputs
from sparsiattn.attention.key_lists import KeyBlocks, KeyLists
from sparsiattn.attention.pattern import Pattern
from sparsiattn.kernels._triton.ops import key_list_attention
from sparsiattn.kernels.base import Kernel
from sparsiattn.kernels.gather import dense_rows, needs_grad
from sparsiattn.kernels.padding import slot_macs, summary_count

_INSTALLED = importlib.util.find_spec("triton") is not None
# triton, too, reads this once: kernels then run on the CPU, slowly, to be tested
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_WIDEST = 256

# Multiply-accumulates per second of dense and of our attention, half and single precision, bytes
# per second from the cache that holds keys, and seconds of planning and launches: an H200's data
# sheet and what such kernels commonly reach of it, not measured here.
_DENSE = {2: 175e12, 4: 12e12}
_OURS = {2: 80e12, 4: 5e12}
_CACHE = 5e12
_STARTS, _START = 200e-6, 10e-6


class Triton(Kernel):
    """Key lists and key blocks without copies: rows of K and V are read where they stand, queries
    through their tiles, with a running softmax (FlashAttention, arXiv 2205.14135).

    Differentiable, the host's bias and the background's logits included. Tiles share keys, so the
    gradients of keys, values and biases are added up atomically, in float32: their last bits
    differ between runs. Single precision is computed as such, never in TF32.
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
        found = self.why_unavailable()
        if not isinstance(pattern, KeyLists):
            found.append(f"needs key lists, got a {type(pattern).__name__} pattern")
        if pattern.summary is not None and pattern.summary.per_query:
            found.append("background keys differ between queries under this host mask")
        return found + _unfit(inputs)

    def speed(self, inputs: AttentionInputs, pattern: Pattern) -> float:
        assert isinstance(pattern, KeyLists)
        batch, heads, queries, dim = inputs.q.shape
        itemsize, width = inputs.q.element_size(), dim + inputs.v.shape[-1]
        tile = 1 if pattern.tiles is None else pattern.tiles.size
        keys = pattern.width + (pattern.summary.count if pattern.summary else 0)
        size = batch * heads * queries * width
        empty = _padded(tile) / tile * (_padded(dim) + _padded(inputs.v.shape[-1])) / width
        dense = size * inputs.n_keys / _DENSE[itemsize] + _START
        ours = size * keys * (empty / _OURS[itemsize] + itemsize / tile / _CACHE) + _STARTS
        return dense / ours

    def uncounted_macs(self, inputs: AttentionInputs, pattern: Pattern) -> int:
        assert isinstance(pattern, KeyLists)
        tile = _padded(1 if pattern.tiles is None else pattern.tiles.size)
        width = _padded(inputs.q.shape[-1]) + _padded(inputs.v.shape[-1])
        slots = _places(pattern) + summary_count(pattern)
        return slot_macs(inputs, pattern, slots, tile=tile, width=width)

    def __call__(self, inputs: AttentionInputs, pattern: Pattern) -> Tensor:
        assert isinstance(pattern, KeyLists)
        first, tiles, summary = pattern.dense_rows, pattern.tiles, pattern.summary
        pooled = [None if summary is None else summary.pool(x) for x in (inputs.k, inputs.v)]
        out: Tensor = key_list_attention(
            inputs.q,
            inputs.k,
            inputs.v,
            *pooled,
            _four_axes(inputs.bias),
            None if summary is None else summary.bias,
            None if tiles is None else tiles.order,
            None if tiles is None or tiles.even else tiles.weight,
            *_lists(pattern),
            dense_rows(inputs, first) if first else None,
            pattern.prefix if isinstance(pattern, KeyBlocks) else 0,
            _places(pattern),
            inputs.scale,
            None if inputs.site.bias == "bias" else MASKED_BELOW,
        )[0]
        return out


def _unfit(inputs: AttentionInputs) -> list[str]:
    """What is wrong with the operands."""
    found, q, k, v = [], inputs.q, inputs.k, inputs.v
    # a dry run on shapes alone says nothing of the device that the call will run on
    devices = ("cuda", "meta", "cpu") if _INTERPRETED else ("cuda", "meta")
    if q.device.type not in devices:
        found.append(f"needs CUDA tensors, got {q.device.type}")
    if q.dtype not in _DTYPES or len({q.dtype, k.dtype, v.dtype}) > 1:
        found.append(
            "needs q, k and v of one type, float32, float16 or bfloat16, got "
            f"{q.dtype}, {k.dtype} and {v.dtype}"
        )
    if max(q.shape[-1], v.shape[-1]) > _WIDEST:
        found.append(f"needs head dims up to {_WIDEST}, got {q.shape[-1]} and {v.shape[-1]}")
    if inputs.dropout:
        found.append("has no dropout")
    if needs_grad(inputs) and torch.are_deterministic_algorithms_enabled():
        found.append("adds gradients of keys atomically, and torch is asked to be deterministic")
    return found


def _lists(pattern: KeyLists) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Keys or blocks of every tile, ``[B|1, H|1, T, C]``, how many keys each of these blocks gives
    (None where all but the last are whole), and the keys of every block, ``[U, g]``."""
    if not isinstance(pattern, KeyBlocks):
        return pattern.index, None, None
    blocks, chosen = pattern.blocks, pattern.chosen
    if blocks.even:
        return chosen, None, blocks.order
    held = (blocks.weight > 0).sum(-1)[chosen]
    missing = pattern.keys - pattern.prefix - (held.cumsum(-1) - held)
    return chosen, held.minimum(missing.clamp_min(0)), blocks.order


def _places(pattern: KeyLists) -> int:
    """Places in every list: its keys, or all slots of its blocks where some repeat a key."""
    if isinstance(pattern, KeyBlocks) and not pattern.blocks.even:
        return pattern.prefix + pattern.chosen.shape[-1] * pattern.blocks.size
    return pattern.width


def _four_axes(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias[(None,) * (4 - bias.dim())]


def _padded(size: int) -> int:
    """What a kernel computes for a side of this size."""
    return max(16, 1 << (size - 1).bit_length())
