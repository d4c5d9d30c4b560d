"""The Triton kernels as operators of torch, opaque to its compiler and differentiable."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("sparsiattn::key_list_attention", mutates_args=())
def key_list_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pooled_k: Tensor | None,
    pooled_v: Tensor | None,
    host: Tensor | None,
    rows: Tensor | None,
    order: Tensor | None,
    weight: Tensor | None,
    chosen: Tensor,
    held: Tensor | None,
    table: Tensor | None,
    dense: Tensor | None,
    prefix: int,
    keys: int,
    scale: float,
    lowest: float | None,
) -> tuple[Tensor, Tensor]:
    """Attention of query tiles to their lists, ``[B, H, P + n, Dv]``, and the logarithms of the
    softmax's sums, ``[B, H, n]``. dense: the result of the leading P queries, ``[B, H, P, Dv]``;
    the other operands as `sparsiattn.kernels._triton.launch.Call` has them."""
    from sparsiattn.kernels._triton import launch

    first = 0 if dense is None else dense.shape[-2]
    call = _call(
        q, k, v, pooled_k, pooled_v, host, rows, order, weight, chosen, held, table,
        first, prefix, keys, scale, lowest,
    )  # fmt: skip
    out, lse = _results(q, v, first)
    if dense is not None:
        out[..., :first, :] = dense
    launch.forward(call, out, lse).run(q.device)
    return out, lse


@torch.library.custom_op("sparsiattn::key_list_attention_backward", mutates_args=())
def key_list_attention_backward(
    grad: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pooled_k: Tensor | None,
    pooled_v: Tensor | None,
    host: Tensor | None,
    rows: Tensor | None,
    order: Tensor | None,
    weight: Tensor | None,
    chosen: Tensor,
    held: Tensor | None,
    table: Tensor | None,
    first: int,
    prefix: int,
    keys: int,
    scale: float,
    lowest: float | None,
    to_host: bool,
    to_rows: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, pooled_k, pooled_v, host and rows; empty tensors for what is not there
    or not wanted."""
    from sparsiattn.kernels._triton import launch

    call = _call(
        q, k, v, pooled_k, pooled_v, host, rows, order, weight, chosen, held, table,
        first, prefix, keys, scale, lowest,
    )  # fmt: skip
    # keys are shared by tiles, so theirs add up in single precision
    sums = [
        None if x is None else torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        for x in (k, v, pooled_k, pooled_v, host if to_host else None, rows if to_rows else None)
    ]
    to_q = q.new_empty(q.shape)
    to_q[..., :first, :] = 0
    launch.backward(call, out, lse, _with_rows(grad), [to_q, *sums]).run(q.device)
    operands = (k, v, pooled_k, pooled_v, host, rows)
    found = [_cast(sum_, x, q) for sum_, x in zip(sums, operands, strict=True)]
    return to_q, found[0], found[1], found[2], found[3], found[4], found[5]


@key_list_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    dense = others[9]
    return _results(q, v, 0 if dense is None else dense.shape[-2])


@key_list_attention_backward.register_fake
def _(grad: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor,
      pooled_k: Tensor | None, pooled_v: Tensor | None, host: Tensor | None,
      rows: Tensor | None, *others: Any) -> tuple[Tensor, ...]:  # fmt: skip
    to_host, to_rows = others[-2:]
    wanted = (q, k, v, pooled_k, pooled_v, host if to_host else None, rows if to_rows else None)
    return tuple(q.new_empty(0) if x is None else x.new_empty(x.shape) for x in wanted)


def _call(*operands: Any) -> Any:
    """A `Call` whose rows are contiguous: only the last axis must be, the others have strides."""
    from sparsiattn.kernels._triton.launch import Call

    rows: list[Any] = [_with_rows(x) for x in operands[:3]]
    whole = [
        x.contiguous() if isinstance(x, Tensor) else x for x in (*operands[3:5], *operands[7:])
    ]
    return Call(*rows, *whole[:2], *operands[5:7], *whole[2:])


def _with_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _results(q: Tensor, v: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """Room for both results, laid out as torch's own attention does, so that the host's reshape
    copies nothing."""
    b, h, n, _ = q.shape
    out = q.new_empty(b, n, h, v.shape[-1]).transpose(1, 2)
    return out, q.new_empty(b, h, n - first, dtype=torch.float32)


def _cast(found: Tensor | None, x: Tensor | None, q: Tensor) -> Tensor:
    return q.new_empty(0) if found is None or x is None else found.to(x.dtype)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, dense, prefix, keys, scale, lowest = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.numbers = (0 if dense is None else dense.shape[-2], prefix, keys, scale, lowest)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 17
    *tensors, out, lse = ctx.saved_tensors
    first, needs = ctx.numbers[0], ctx.needs_input_grad
    found = key_list_attention_backward(grad, out, lse, *tensors, *ctx.numbers, needs[5], needs[6])
    wanted = (x if need else None for x, need in zip(found, needs[:7], strict=True))
    to_dense = grad[..., :first, :] if needs[12] else None
    return (*wanted, None, None, None, None, None, to_dense, None, None, None, None)


key_list_attention.register_autograd(_gradients, setup_context=_keep)
