"""What kernels of their own code say to derivatives that they do not have."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from torch import Tensor

from sparsiattn.attention.background import CountedSummary, Summary
from sparsiattn.attention.derivatives import differentiable_again, is_transformed
from sparsiattn.attention.inputs import AttentionInputs
from sparsiattn.attention.pattern import Pattern
from sparsiattn.errors import KernelRefused
from sparsiattn.kernels.reference import Reference


def transform_refusals() -> list[str]:
    """Why a kernel that reads memory cannot run; empty outside of transforms."""
    if not is_transformed():
        return []
    return [
        "runs code of its own, which torch.func transforms (vmap, grad, jvp) and forward-mode "
        "derivatives cannot see into: use kernel='reference' or 'gather'"
    ]


def twice_differentiable(
    name: str, out: Tensor, inputs: AttentionInputs, pattern: Pattern
) -> Tensor:
    """What a kernel with one backward pass returned; second derivatives are the reference's.

    Args:
        name: The kernel's.
        out: What it returned.
        inputs: The call.
        pattern: What it computed.
    """
    summary = pattern.summary
    # logs of counts pass no gradient, so nobody counts them before they are needed
    counted = isinstance(summary, CountedSummary) and summary.counted and inputs.bias is None
    rows = None if summary is None or counted else summary.bias
    # operands are saved by autograd alone, so that checkpoints can let go of them
    none = inputs.q.new_empty(0)
    call = inputs.replace(q=none, k=none, v=none, bias=None, token_state=None, cross_layer=None)
    if summary is not None and not counted:
        rest = Summary(summary.cells, summary.parts, none, summary.allowed)
        pattern = replace(pattern, summary=rest)  # type: ignore[type-var]
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
            f"kernel {name!r} at site {call.site.name!r} has no second derivatives with dropout of "
            "attention weights, which it draws by itself: use kernel='reference', or set the "
            "dropout to 0"
        )
    if pattern.summary is not None and rows is not None:
        summary = replace(pattern.summary, bias=rows)
        pattern = replace(pattern, summary=summary)  # type: ignore[type-var]
    return Reference()(call.replace(q=q, k=k, v=v, bias=bias), pattern)
