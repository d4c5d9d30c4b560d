"""Derivatives that fused operators lack: second ones, forward mode, `torch.func` transforms.

A fused operator has its own backward pass, which cannot be differentiated again. Where more is
needed, the functions here compute the same result in plain torch operations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.autograd import forward_ad
from torch.nn import functional as F


def is_tracing() -> bool:
    """Whether `torch.jit.trace` is recording."""
    return bool(torch.jit.is_tracing())  # type: ignore[attr-defined, no-untyped-call]


def is_exporting() -> bool:
    """Whether a program for any batch size is recorded (`torch.export`, `torch.jit.trace`).

    The runtimes that execute such a program fuse other operations than torch does.
    """
    # not `is_exporting()`, to which older versions of Dynamo answer True in every compiled program
    return bool(torch.compiler._is_exporting_flag) or is_tracing()


def is_transformed() -> bool:
    """Whether a transform of `torch.func` (`vmap`, `grad`, `jvp`) or forward-mode AD is active.

    The tensors it wraps have neither storage nor gradients that a fused operator could use.
    """
    if torch.compiler.is_compiling():
        return False
    interpreters: Any = torch._C._functorch.peek_interpreter_stack()
    return interpreters is not None or forward_ad._current_level >= 0


@contextmanager
def outside_transforms() -> Iterator[None]:
    """Context manager that suspends the transforms of `torch.func`.

    ``grad`` wraps every tensor that is made inside of it, and what it wraps cannot be used after
    it: a tensor that is to be cached must be made here, from numbers.
    """
    with temporarily_clear_interpreter_stack():
        yield


def is_unobserved(q: Tensor, k: Tensor) -> bool:
    """Whether no tracer, mode, transform or profiler observes operators on these tensors.

    Compiled code may then be called directly instead of through a torch operator. Between two
    layers, when the CPU caches hold other code, dispatching one operator takes a tenth of the time
    of a small site.
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

    Rows without any key are zero.
    """
    # as torch does: float16 products of large logits would overflow
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
"""Computes the result from the operands, in plain operations."""


def differentiable_again(out: Tensor, recompute: Recompute, *operands: Tensor | None) -> Tensor:
    """The result of a fused operator, with a gradient that can itself be differentiated.

    An ordinary backward pass is the operator's own. Only a backward pass with
    ``create_graph=True`` recomputes the result.

    Args:
        out: The result.
        recompute: Computes the same result from the operands; holds no tensors of the graph itself.
        *operands: The tensors that gradients flow to.
    """
    if not (torch.is_grad_enabled() and out.requires_grad):
        return out
    # compiled programs are differentiated once, traced ones run no Python
    if torch.compiler.is_compiling() or is_tracing() or is_transformed():
        return out
    return _DifferentiableAgain.apply(out, recompute, *operands)  # type: ignore[no-any-return]


class _DifferentiableAgain(torch.autograd.Function):
    """The identity; its backward pass recomputes the result if a graph is to be created."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, recompute: Recompute, *operands: Tensor | None) -> Tensor:
        ctx.save_for_backward(*operands)
        ctx.recompute = recompute
        return out.detach()  # not `out`: the host may write into the result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        operands = ctx.saved_tensors
        if not torch.is_grad_enabled():
            return (grad, None, *(None for _ in operands))
        # aliases, so that hooks on the operands see their gradient once
        aliases = [None if x is None else x.view_as(x) for x in operands]
        wanted = [x for x in aliases if x is not None and x.requires_grad]
        grads = torch.autograd.grad(
            ctx.recompute(*aliases).to(grad.dtype),
            wanted,
            grad,
            create_graph=True,
            allow_unused=True,
        )
        remaining = iter(grads)
        operand_grads = (
            next(remaining) if x is not None and x.requires_grad else None for x in aliases
        )
        return (None, None, *operand_grads)
