"""Attention over key lists with compiled forward and backward passes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsiattn.kernels.native import build, entries
from sparsiattn.kernels.native.ops import (
    SPAN,
    addresses_of,
    attention,
    attention_call,
    whole_vectors,
    with_rows,
)
from sparsiattn.kernels.workspace import SCRATCH


def differentiable_attention(q: Tensor, k: Tensor, v: Tensor, *others: Any) -> Tensor:
    """`ops.attention` with gradients of q, k and v."""
    return _Attention.apply(q, k, v, *others)  # type: ignore[no-any-return]


class _Attention(torch.autograd.Function):
    """Saves only the operands for the backward pass, which recomputes the weights."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, *others: Any) -> Tensor:
        is_tensor = [isinstance(x, Tensor) for x in others]
        ctx.save_for_backward(q, k, v, *(x for x in others if isinstance(x, Tensor)))
        ctx.others = [None if tensor else x for x, tensor in zip(others, is_tensor, strict=True)]
        ctx.is_tensor = is_tensor
        return attention(q, k, v, *others)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *saved = ctx.saved_tensors
        tensors = iter(saved)
        others = [
            next(tensors) if tensor else x
            for x, tensor in zip(ctx.others, ctx.is_tensor, strict=True)
        ]
        return (*_gradients(grad, q, k, v, *others), *(None for _ in others))


def _gradients(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chosen: Tensor,
    table: Tensor | None,
    held: Tensor | None,
    order: Tensor | None,
    cells: Tensor | None,
    bias: Tensor | None,
    count: int,
    listed: int,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, in their dtypes.

    Args:
        grad: Gradient of the result, ``[B, H, N, Dv]``.
        q: The remaining arguments are those of `ops.attention`.
    """
    dtype = q.dtype
    q, k, v, grad = (with_rows(x.float()) for x in (q, k, v, grad))
    to = [torch.empty(x.shape, dtype=torch.float32) for x in (q, k, v)]
    lists = (chosen, table, held, order, cells, bias, count, listed)
    packed, _kept = attention_call(q, k, v, grad, *lists, *options)
    room = room_of(listed + count, k.shape[-2], count, q.shape[-1] + v.shape[-1])
    scratch = SCRATCH.numbers("backward", torch.get_num_threads() * room, q)
    packed_rest = entries.BACKWARD_REST.pack(q.shape[-2], room, *addresses_of(*to, scratch))
    build.code().backward(packed + packed_rest)
    grad_q, grad_k, grad_v = (x.to(dtype) for x in to)
    return grad_q, grad_k, grad_v


def room_of(width: int, keys: int, count: int, dims: int) -> int:
    """Size of a thread's memory in floats, which `sums_of` in backward.c divides.

    Args:
        width: Number of keys of a list, summary keys included.
        keys: Number of all keys.
        count: Number of summary keys.
        dims: Channels of a key plus its value.
    """
    most = max(width, keys)
    return whole_vectors(8 * most + 2 * (width * SPAN + most + SPAN) + count * dims)
