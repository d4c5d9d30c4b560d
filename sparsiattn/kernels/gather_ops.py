"""Attention of query tiles over gathered rows, a few tiles at a time.

On the CPU the chunks use buffers that are allocated once: allocating large temporaries again costs
more in page faults than the arithmetic on them. For the backward pass only the operands and the
result are saved; it gathers again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsiattn.attention.derivatives import is_exporting, is_tracing, is_transformed
from sparsiattn.attention.logits import products
from sparsiattn.attention.sdpa import differentiable_attention
from sparsiattn.kernels.workspace import SCRATCH

# Gathered keys, values and logits of a chunk of tiles, in elements. On a CPU a chunk should fit the
# cache (CACHED). On a GPU, and where a compiler unrolls the loop, chunks should be few (LAUNCHED).
CACHED, LAUNCHED = 1 << 19, 1 << 26

# Limit of the axes of a CUDA grid along which torch's attention launches its batch.
MOST_BATCHES = 65_535


@dataclass(frozen=True, eq=False)
class GatherOperands:
    """Tiles of queries, and the units of keys that each tile attends to.

    Attributes:
        q: Queries by tile, ``[B, H, T, t, D]``.
        k: Units of g keys, ``[B, H, U, g, D]``; g is 1 or the size of a block.
        v: Their values, ``[B, H, U, g, Dv]``.
        index: The units of each tile, ``[B|1, H|1, T, C]``.
        bias: Added to the logits of the last W of a tile's ``C * g`` keys,
            ``[B|1, H|1, T, t|1, W]``; None if there is none.
        scale: Factor of QK^T.
        dropout: Dropout probability of attention weights.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    index: Tensor
    bias: Tensor | None
    scale: float
    dropout: float = 0.0


def attend_in_scratch(operands: GatherOperands) -> Tensor:
    """`attend` without new memory, where `can_buffer` is true and nothing needs a gradient.

    Returns:
        ``[B, H, T, t, Dv]`` in `SCRATCH`. It overwrites the queries there if the shapes agree.
    """
    q, v = operands.q, operands.v
    # a chunk's queries are read before its result is written
    name = "q" if v.shape[-1] == q.shape[-1] else "out"
    out = SCRATCH.room(name, (*q.shape[:4], v.shape[-1]), q)
    _attend_chunks(_Buffers(_flatten(operands), weights=1), operands.scale, out.flatten(0, 2))
    return out


def _attend_chunks(buffers: _Buffers, scale: float, out: Tensor) -> None:
    for chunk in buffers.chunks:
        k, v = buffers.gather(chunk)
        torch.bmm(buffers.softmax(chunk, k, scale), v, out=out[chunk])


def attend(operands: GatherOperands) -> Tensor:
    """Attention of every tile over its units, ``[B, H, T, t, Dv]``."""
    q, scale = operands.q, operands.scale
    flat = _flatten(operands)
    if can_buffer(q, operands.dropout):
        out = _BufferedAttention.apply(*flat, scale)
    else:
        out = _plain(flat, scale, operands.dropout)
    return out.unflatten(0, q.shape[:3])  # type: ignore[no-any-return]


Flat = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]
"""q ``[S, t, D]``, k and v ``[B * H * U, g, D]``, index ``[S, C]`` and bias ``[S, t|1, W]`` for the
``S = B * H * T`` tiles."""


def _flatten(operands: GatherOperands) -> Flat:
    q, k, v, bias = operands.q, operands.k, operands.v, operands.bias
    b, h, units = k.shape[:3]
    index = operands.index
    if b * h > 1:
        index = index + torch.arange(b * h, device=k.device).view(b, h, 1, 1) * units
    if bias is not None:
        bias = bias.to(q.dtype).expand(*q.shape[:3], -1, -1).flatten(0, 2)
    return q.flatten(0, 2), k.flatten(0, 2), v.flatten(0, 2), index.flatten(0, 2), bias


def can_buffer(q: Tensor, dropout: float) -> bool:
    """Whether the buffered path may run: eager, on the CPU, in float32 or float64."""
    return (
        q.device.type == "cpu"
        and q.dtype in (torch.float32, torch.float64)
        and not dropout
        and not torch.compiler.is_compiling()
        and not is_tracing()
        and not is_transformed()
    )


def tiles_at_once(device: torch.device, size: int) -> int:
    """How many tiles make one chunk; threads share the tiles evenly.

    Args:
        device: Device of the computation.
        size: Number of elements that each tile needs.
    """
    cached = device.type == "cpu" and not torch.compiler.is_compiling()
    threads = torch.get_num_threads() if cached else 1
    tiles = threads * max(1, (CACHED if cached else LAUNCHED) // (threads * size))
    return tiles if device.type == "cpu" else min(tiles, MOST_BATCHES)


def _chunks(flat: Flat) -> list[slice]:
    """Slices over tiles whose gathered rows fit the limit of one chunk."""
    q, k, v, index, _ = flat
    size = index.shape[-1] * k.shape[-2] * (k.shape[-1] + v.shape[-1] + q.shape[1])
    step = tiles_at_once(q.device, size)
    # counting or comparing the tiles would specialise the traced program to this batch size
    if is_exporting() or (torch.compiler.is_compiling() and q.shape[0] <= step):
        return [slice(None)]
    if q.device.type != "cpu":
        step = _even_step(len(q), step)
    # an empty batch still gets one (empty) chunk
    return [slice(i, min(i + step, len(q))) for i in range(0, max(1, len(q)), step)]


def _even_step(count: int, most: int) -> int:
    """A size of chunks of at most ``most``, so that all are equal if that takes few more chunks.

    On a GPU, cuDNN plans each shape anew, which takes longer than many calls.
    """
    fewest = -(-count // most)
    even = (count // chunks for chunks in range(fewest, 2 * fewest + 1) if count % chunks == 0)
    return next(even, most) if fewest > 1 else most


def _plain(flat: Flat, scale: float, dropout: float) -> Tensor:
    """torch's own attention chunk by chunk: any device, dtype or compiler, with dropout."""
    q, k, v, index, bias = flat
    if is_exporting() and not dropout:
        return _exported(flat, scale)
    parts = []
    for chunk in _chunks(flat):
        units = index[chunk].flatten()
        keys, values = (
            x.index_select(0, units).view(-1, 1, index.shape[-1] * x.shape[1], x.shape[2])
            for x in (k, v)
        )
        mask = None
        if bias is not None:  # zeros for the columns before its last ones, [s, 1, t|1, K]
            mask = F.pad(bias[chunk].unsqueeze(1), (keys.shape[-2] - bias.shape[-1], 0))
        part = differentiable_attention(
            q[chunk].unsqueeze(1), keys, values, mask, dropout, scale=scale
        )
        parts.append(part.squeeze(1))
    return torch.cat(parts)


def _exported(flat: Flat, scale: float) -> Tensor:
    """All tiles at once in plain matrix products, which runtimes fuse with the softmax.

    A loop over chunks would be unrolled, and ONNX's masked attention scales and transposes all
    gathered keys in separate passes.
    """
    q, k, v, index, bias = flat
    units = index.flatten()
    keys, values = (
        x.index_select(0, units).view(-1, index.shape[-1] * x.shape[1], x.shape[2]) for x in (k, v)
    )
    logits = products(q, keys, scale)
    if bias is not None:
        logits = logits + F.pad(bias, (logits.shape[-1] - bias.shape[-1], 0))
    return logits.softmax(-1).to(v.dtype) @ values


class _Buffers:
    """Buffers for one chunk's gathered rows and attention weights."""

    def __init__(self, flat: Flat, weights: int) -> None:
        self.q, self.k, self.v, self.index, self.bias = flat
        self.chunks = _chunks(flat)
        most = self.chunks[0].stop if self.chunks else 0
        units, size = self.index.shape[-1], self.k.shape[1]
        self._rows = [
            SCRATCH.room(name, (most * units, *x.shape[1:]), x)
            for name, x in (("keys", self.k), ("values", self.v))
        ]
        shape = (most, self.q.shape[1], units * size)
        self._weights = [SCRATCH.room(f"weights {i}", shape, self.q) for i in range(weights)]

    def gather(self, chunk: slice) -> list[Tensor]:
        """Keys ``[s, K, D]`` and values ``[s, K, Dv]`` of a chunk."""
        units = self.index[chunk].reshape(-1)
        gathered = []
        for x, room in zip((self.k, self.v), self._rows, strict=True):
            rows = room[: len(units)]
            torch.index_select(x, 0, units, out=rows)
            gathered.append(rows.view(chunk.stop - chunk.start, -1, x.shape[-1]))
        return gathered

    def weights(self, chunk: slice, which: int = 0) -> Tensor:
        """The buffer for a chunk's logits or weights, ``[s, t, K]``."""
        return self._weights[which][: chunk.stop - chunk.start]

    def softmax(self, chunk: slice, k: Tensor, scale: float) -> Tensor:
        """Attention weights of a chunk, ``[s, t, K]``, in the first buffer."""
        p = self.weights(chunk)
        torch.baddbmm(p, self.q[chunk], k.mT, beta=0, alpha=scale, out=p)
        if self.bias is not None:
            p[..., p.shape[-1] - self.bias.shape[-1] :] += self.bias[chunk]
        return torch.softmax(p, dim=-1, out=p)


class _BufferedAttention(torch.autograd.Function):
    """The buffered path with its own backward pass, and a second one that is differentiable."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, index: Tensor, bias: Tensor | None, scale: float
    ) -> Tensor:
        out = q.new_empty(*q.shape[:2], v.shape[-1])
        _attend_chunks(_Buffers((q, k, v, index, bias), weights=1), scale, out)
        ctx.save_for_backward(q, k, v, index, bias, out)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *flat, out = ctx.saved_tensors
        # with ``create_graph=True`` or ``is_grads_batched=True``
        if torch.is_grad_enabled() or _is_batched(grad):
            grads = _plain_gradients(tuple(flat), grad, ctx.scale)
        else:
            grads = _buffered_gradients(tuple(flat), out, grad.contiguous(), ctx.scale)
        *operands, grad_bias = grads
        return *operands, None, grad_bias, None


def _is_batched(grad: Tensor) -> bool:
    return is_transformed() or bool(torch._C._functorch.is_legacy_batchedtensor(grad))


def _buffered_gradients(
    flat: Flat, out: Tensor, grad: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of q, k, v and bias, computed chunk by chunk."""
    q, k, v, index, bias = flat
    buffers = _Buffers(flat, weights=2)
    grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    grad_bias = torch.empty_like(bias) if bias is not None and bias.requires_grad else None
    # dS = P (dP - rowsum(dO O)), as in FlashAttention (arXiv 2205.14135, appendix B.2)
    delta = (grad * out).sum(-1, keepdim=True)
    for chunk in buffers.chunks:
        keys, values = buffers.gather(chunk)
        p, ds = buffers.softmax(chunk, keys, scale), buffers.weights(chunk, 1)
        _scatter(p.mT @ grad[chunk], index[chunk], into=grad_v)
        torch.bmm(grad[chunk], values.mT, out=ds)
        ds.sub_(delta[chunk]).mul_(p)
        if grad_bias is not None:
            grad_bias[chunk] = _last_columns(ds, grad_bias)
        ds.mul_(scale)
        torch.bmm(ds, keys, out=grad_q[chunk])
        _scatter(ds.mT @ q[chunk], index[chunk], into=grad_k)
    return grad_q, grad_k, grad_v, grad_bias


def _plain_gradients(
    flat: Flat, grad: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """As `_buffered_gradients`, in operations that can be differentiated and batched."""
    q, k, v, index, bias = flat
    keys, values = (x[index].flatten(1, 2) for x in (k, v))  # [S, K, D]
    logits = scale * q @ keys.mT
    if bias is not None:
        logits = logits + F.pad(bias, (logits.shape[-1] - bias.shape[-1], 0))
    p = logits.softmax(-1)
    dp = grad @ values.mT
    ds = p * (dp - (p * dp).sum(-1, keepdim=True))
    grad_bias = _last_columns(ds, bias) if bias is not None and bias.requires_grad else None
    grad_k = _summed(scale * ds.mT @ q, index, like=k)
    return scale * ds @ keys, grad_k, _summed(p.mT @ grad, index, like=v), grad_bias


def _summed(rows: Tensor, index: Tensor, like: Tensor) -> Tensor:
    """The gradient of gathered keys ``[S, K, D]``, added up by unit ``[R, g, D]``."""
    flat = rows.reshape(index.numel(), -1)
    zeros = flat.new_zeros(like.shape[0], flat.shape[-1])
    return zeros.index_add(0, index.flatten(), flat).view_as(like)


def _scatter(rows: Tensor, index: Tensor, into: Tensor) -> None:
    """Add the gradient of gathered keys ``[s, K, D]`` to their units ``[R, g, D]``."""
    flat, target = rows.reshape(index.numel(), -1), into.flatten(1)
    target.scatter_add_(0, index.reshape(-1, 1).expand_as(flat), flat)


def _last_columns(ds: Tensor, bias: Tensor) -> Tensor:
    """The gradient of a bias on the last columns, summed over queries that share it."""
    columns = bias.shape[-1]
    # batched gradients cannot be sliced over all columns
    last = ds if columns == ds.shape[-1] else ds[..., ds.shape[-1] - columns :]
    return last.sum(1, keepdim=True) if bias.shape[1] == 1 < ds.shape[1] else last
