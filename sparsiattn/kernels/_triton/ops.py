"""The Triton kernels as differentiable operators of torch, whose compiler sees the kernels.

Their operands are those of `sparsiattn.kernels._triton.launch.KeyListOperands`, in its order.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparsiattn.kernels._triton.visible import is_traced, show_kernels

if TYPE_CHECKING:  # imports triton
    from sparsiattn.kernels._triton.launch import KeyListOperands

_TENSORS = (
    "Tensor q, Tensor k, Tensor v, Tensor? pooled_k, Tensor? pooled_v, Tensor? host, Tensor? rows, "
    "Tensor? order, Tensor? weight, Tensor chosen, Tensor? held, Tensor? table"
)
_NUMBERS = "SymInt first, SymInt prefix, SymInt keys, float scale, float? lowest"
_FORWARD = f"({_TENSORS}, {_NUMBERS}) -> (Tensor, Tensor)"
_BACKWARD = (
    f"(Tensor grad, Tensor out, Tensor lse, {_TENSORS}, {_NUMBERS}, "
    f"bool to_host, bool to_rows, bool repeatable) -> ({', '.join(['Tensor'] * 7)})"
)


def _attention(*operands: Any) -> tuple[Tensor, Tensor]:
    """Attention of query tiles to their key lists, and of the leading queries to every key.

    Args:
        *operands: Those of `KeyListOperands`.

    Returns:
        ``[B, H, P + n, Dv]``, and the log-sum-exp of each row, ``[B, H, P + n]``.
    """
    from sparsiattn.kernels._triton import launch

    call = launch.KeyListOperands(*_readable(*operands))
    out, lse = _results(call.q, call.v)
    launch.forward(call, out, lse).run(call.q.device)
    return out, lse


def _attention_backward(
    grad: Tensor, out: Tensor, lse: Tensor, *operands: Any
) -> tuple[Tensor, ...]:
    """Gradients of `key_list_attention`.

    Args:
        grad: The gradient of its first result.
        out: That result.
        lse: Its second result.
        *operands: Those of `KeyListOperands`, then whether the gradients of ``host`` and of
            ``rows`` are needed, and whether results must be the same in every run.

    Returns:
        Gradients of q, k, v, pooled_k, pooled_v, host and rows; empty tensors for operands that
        are missing or whose gradient is not needed.
    """
    from sparsiattn.kernels._triton import launch

    *own, to_host, to_rows, repeatable = operands
    call = _with_own_lists(launch.KeyListOperands(*_readable(*own)))
    needed = _with_gradients(own, to_host, to_rows)
    if repeatable:
        return _repeatable_gradients(call, out, lse, _with_rows(grad), needed)
    q, *others = needed
    # tiles share keys, so gradients of keys are summed in float32
    sums = [
        None if x is None else torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        for x in others
    ]
    grad_q = q.new_empty(q.shape)
    launch.backward(call, out, lse, _with_rows(grad), [grad_q, *sums]).run(q.device)
    pairs = zip(sums, others, strict=True)
    return grad_q, *(q.new_empty(0) if total is None else total.to(x.dtype) for total, x in pairs)


def _with_own_lists(call: KeyListOperands) -> KeyListOperands:
    """The operands as torch's compiler may see them.

    The lists say where the kernel adds, so torch takes them for results, too. Of copies it writes
    nothing back to tensors that were saved for the backward pass.
    """
    if not is_traced():
        return call
    table = None if call.table is None else call.table.clone()
    return replace(call, chosen=call.chosen.clone(), table=table)


def _repeatable_gradients(
    call: KeyListOperands, out: Tensor, lse: Tensor, grad: Tensor, needed: list[Any]
) -> tuple[Tensor, ...]:
    """The gradients, none of which depends on the order in which programs run."""
    from sparsiattn.kernels._triton import key_gradients, launch

    q, pooled_k, host, rows = needed[0], needed[3], *needed[5:]
    found = [q.new_empty(0) if x is None else x.new_empty(x.shape) for x in needed[:5]]
    # one number for every pair of a query and a key: each is added to once
    lead = q.shape[:2]
    each_host = _zeros_or_none(host, (*lead, call.queries, call.k.shape[-2]))
    each_row = _zeros_or_none(
        rows, (*lead, call.queries - call.first, 0 if rows is None else rows.shape[-1])
    )
    into = [found[0], None, None, None, None, each_host, each_row]
    launch.backward(call, out, lse, grad, into).run(q.device)
    delta = (grad.float() * out.float()).sum(-1).contiguous()
    member = key_gradients.membership(call)
    key_gradients.of_keys(call, lse, delta, grad, member, *found[1:3]).run(q.device)
    if pooled_k is not None:
        key_gradients.of_cells(call, lse, delta, grad, *found[3:5]).run(q.device)
    return (
        *found,
        q.new_empty(0) if each_host is None else each_host.sum_to_size(host.shape).to(host.dtype),
        q.new_empty(0) if each_row is None else _sum_of_tiles(each_row, call, rows),
    )


def _zeros_or_none(like: Tensor | None, shape: tuple[int, ...]) -> Tensor | None:
    if like is None:
        return None
    return torch.zeros(shape, dtype=torch.float32, device=like.device)


def _sum_of_tiles(each: Tensor, call: KeyListOperands, rows: Tensor) -> Tensor:
    """Gradients of every patch query, ``[B, H, n, G]``, to those of ``rows``."""
    if rows.shape[-2] != each.shape[-2] and call.order is not None:
        each = each.index_select(-2, call.order.flatten()).unflatten(-2, call.order.shape)
        if call.weight is not None:
            each = each * (call.weight > 0).unsqueeze(-1)
        each = each.sum(-2)
    return each.sum_to_size(rows.shape).to(rows.dtype)


key_list_attention = torch.library.custom_op(
    "sparsiattn::key_list_attention", _attention, mutates_args=(), schema=_FORWARD
)
key_list_attention_backward = torch.library.custom_op(
    "sparsiattn::key_list_attention_backward",
    _attention_backward,
    mutates_args=(),
    schema=_BACKWARD,
)
show_kernels(key_list_attention, _attention)
show_kernels(key_list_attention_backward, _attention_backward)


@key_list_attention.register_fake
def _(*operands: Any) -> tuple[Tensor, Tensor]:
    return _results(operands[0], operands[2])


@key_list_attention_backward.register_fake
def _(grad: Tensor, out: Tensor, lse: Tensor, *operands: Any) -> tuple[Tensor, ...]:
    q, *others = _with_gradients(operands, *operands[-3:-1])
    return tuple(q.new_empty(0) if x is None else x.new_empty(x.shape) for x in (q, *others))


def _with_gradients(operands: Any, to_host: bool, to_rows: bool) -> list[Any]:
    """The operands of `GRADIENTS` whose gradient is needed; None for the others."""
    *tensors, host, rows = operands[:7]
    return [*tensors, host if to_host else None, rows if to_rows else None]


def _readable(*operands: Any) -> list[Any]:
    """Operands in the layout that the kernels read.

    Rows of q, k and v must be contiguous. Their other axes may have any strides, and so may all
    axes of the host's mask and of the summary's logits; the rest must be contiguous.
    """
    rows = [_with_rows(x) for x in operands[:3]]
    pooled, others = (
        [x.contiguous() if isinstance(x, Tensor) else x for x in part]
        for part in (operands[3:5], operands[7:])
    )
    return [*rows, *pooled, *operands[5:7], *others]


def _with_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _results(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Empty tensors for both results, laid out as by torch's own attention.

    The host's reshape then copies nothing.
    """
    b, h, n, _ = q.shape
    out = q.new_empty(b, n, h, v.shape[-1]).transpose(1, 2)
    return out, q.new_empty(b, h, n, dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, first, prefix, keys, scale, lowest = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.numbers = (first, prefix, keys, scale, lowest)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 17
    *tensors, out, lse = ctx.saved_tensors
    needs = ctx.needs_input_grad
    repeatable = torch.are_deterministic_algorithms_enabled()
    options = needs[5], needs[6], repeatable
    grads = key_list_attention_backward(grad, out, lse, *tensors, *ctx.numbers, *options)
    needed = (x if need else None for x, need in zip(grads, needs[:7], strict=True))
    # order, weight, chosen, held, table and the numbers have no gradient
    return (*needed, *(None,) * 10)


key_list_attention.register_autograd(_gradients, setup_context=_save)
