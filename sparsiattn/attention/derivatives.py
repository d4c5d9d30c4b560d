"""Derivatives that fused operators lack: second ones, forward mode, `torch.func` transforms.

Fused operators have one backward pass of their own, in which nothing can be differentiated again.
What stands in for them here is the same mathematics in plain operations of torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F


def is_tracing() -> bool:
    """Whether `torch.jit.trace` records what runs."""
    return bool(torch.jit.is_tracing())  # type: ignore[attr-defined, no-untyped-call]


def is_exporting() -> bool:
    """Whether what runs becomes a program for any batch size (`torch.export`, `torch.jit.trace`).

    Such a program is read by runtimes that fuse other operations than torch does.
    """
    return torch.compiler.is_exporting() or is_tracing()


def is_transformed() -> bool:
    """Whether a transform of `torch.func` (`vmap`, `grad`, `jvp`) or forward-mode AD is active.

    What it wraps has neither memory nor gradients that a fused operator could use.
    """
    if torch.compiler.is_compiling():
        return False
    interpreters: Any = torch._C._functorch.peek_interpreter_stack()
    return interpreters is not None or forward_ad._current_level >= 0


def is_unobserved(q: Tensor, k: Tensor) -> bool:
    """Whether nothing wants to see operators on these: no tracer, mode, transform or profiler.

    They may then be left out: between two layers, where the caches hold other code, torch's
    dispatch of one operator takes a tenth of the time of a small site.
    """
    return (
        type(q) is Tensor
        and type(k) is Tensor
        and not torch.compiler.is_compiling()
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._autograd._profiler_enabled()
        and torch._C._get_tracing_state() is None
        and torch._C._functorch.peek_interpreter_stack() is None
        and forward_ad._current_level < 0
    )


def plain_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float, scale: float
) -> Tensor:
    """Scaled dot product attention in plain operations; arguments as in `dense_attention`.

    A row without a key is zero.
    """
    # as torch's own: float16 products of large logits would overflow
    dtype = torch.promote_types(q.dtype, torch.float32)
    logits = (q.to(dtype) * scale) @ k.to(dtype).mT
    if mask is None:
        weights = logits.softmax(-1)
    else:
        additive = mask.dtype != torch.bool
        logits = logits + mask.to(dtype) if additive else logits.masked_fill(~mask, float("-inf"))
        dead = (logits == float("-inf")).all(-1, keepdim=True)
        weights = logits.masked_fill(dead, 0.0).softmax(-1).masked_fill(dead, 0.0)
    if dropout:
        weights = F.dropout(weights, dropout)
    return (weights @ v.to(dtype)).to(q.dtype)


Recompute = Callable[..., Tensor]
"""From the operands to the result, in plain operations."""


def differentiable_again(out: Tensor, recompute: Recompute, *operands: Tensor | None) -> Tensor:
    """The result of a fused operator, whose gradient can be differentiated.

    The first backward pass is the operator's own. Only one that is to be differentiated in turn
    (``create_graph=True``) computes the result anew.

    Args:
        out: The result.
        recompute: Gives the same from the operands; holds no tensors that they depend on.
        *operands: What gradients flow to.
    """
    if not (torch.is_grad_enabled() and out.requires_grad):
        return out
    # compiled programs are differentiated once, traced ones keep no Python
    if torch.compiler.is_compiling() or is_tracing() or is_transformed():
        return out
    return _DifferentiableAgain.apply(out, recompute, *operands)  # type: ignore[no-any-return]


class _DifferentiableAgain(torch.autograd.Function):
    """The identity; its backward pass leaves out the operator where a graph is to be made."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, recompute: Recompute, *operands: Tensor | None) -> Tensor:
        ctx.save_for_backward(*operands)
        ctx.recompute = recompute
        return out.detach()  # not `out`: hosts may write into what they get

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        operands = ctx.saved_tensors
        if not torch.is_grad_enabled():
            return (grad, None, *(None for _ in operands))
        # aliases, so that hooks of the operands see their gradient once
        aliases = [None if x is None else x.view_as(x) for x in operands]
        wanted = [x for x in aliases if x is not None and x.requires_grad]
        grads = torch.autograd.grad(
            ctx.recompute(*aliases).to(grad.dtype),
            wanted,
            grad,
            create_graph=True,
            allow_unused=True,
        )
        each = iter(grads)
        gave = (next(each) if x is not None and x.requires_grad else None for x in aliases)
        return (None, None, *gave)
