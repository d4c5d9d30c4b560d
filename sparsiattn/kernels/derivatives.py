"""Second derivatives, and refusals of `torch.func` transforms, for kernels of compiled code."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from torch import Tensor

from sparsiattn.attention.background import CountedSummary
from sparsiattn.attention.derivatives import differentiable_again, is_transformed
from sparsiattn.attention.inputs import AttentionInputs
from sparsiattn.attention.pattern import Pattern
from sparsiattn.errors import KernelRefused
from sparsiattn.kernels.reference import Reference


def transform_refusals() -> list[str]:
    """Why a kernel that reads memory directly cannot run; empty outside of transforms."""
    if not is_transformed():
        return []
    return [
        "runs its own compiled code, which torch.func transforms (vmap, grad, jvp) and "
        "forward-mode derivatives cannot differentiate: use kernel='reference' or 'gather'"
    ]


def twice_differentiable(
    name: str, out: Tensor, inputs: AttentionInputs, pattern: Pattern
) -> Tensor:
    """Add second derivatives, those of the reference kernel, to the result of another kernel.

    Args:
        name: Name of the kernel.
        out: The kernel's result, ``[B, H, Nq, Dv]``.
        inputs: The operands of the call.
        pattern: The pattern that it computed.

    Returns:
        The same values; their gradient can be differentiated.
    """
    summary = pattern.summary
    # logs of counts have no gradient, so they need not be counted here
    counted = isinstance(summary, CountedSummary) and summary.counted and inputs.bias is None
    rows = None if summary is None or counted else summary.bias
    # only autograd saves the operands, so that checkpointing can free them
    none = inputs.q.new_empty(0)
    call = inputs.replace(q=none, k=none, v=none, bias=None, token_state=None, cross_layer=None)
    if summary is not None and not counted:
        without_bias = replace(summary, bias=none)
        pattern = replace(pattern, summary=without_bias)  # type: ignore[type-var]
    recompute = partial(_by_reference, name, call, pattern)
    return differentiable_again(out, recompute, inputs.q, inputs.k, inputs.v, inputs.bias, rows)


def _by_reference(
    name: str,
    call: AttentionInputs,
    pattern: Pattern,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    rows: Tensor | None,
) -> Tensor:
    if call.dropout:
        raise KernelRefused(
            f"kernel {name!r} at site {call.site.name!r} draws its own dropout of attention "
            "weights, so it has no second derivatives: use kernel='reference', or set the dropout "
            "to 0"
        )
    if pattern.summary is not None and rows is not None:
        summary = replace(pattern.summary, bias=rows)
        pattern = replace(pattern, summary=summary)  # type: ignore[type-var]
    return Reference()(call.replace(q=q, k=k, v=v, bias=bias), pattern)
