"""Ragged batches on CUDA without padding through torch's own `varlen_attn`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsiattn.attention.inputs import AttentionInputs
from sparsiattn.attention.pattern import Lengths, Pattern
from sparsiattn.kernels.base import Kernel
from sparsiattn.kernels.cost import CallShape, Work
from sparsiattn.kernels.derivatives import transform_refusals, twice_differentiable
from sparsiattn.kernels.sdpa import lengths_work

VARLEN_DTYPES = (torch.float16, torch.bfloat16)


def ragged_refusals(
    inputs: AttentionInputs, pattern: Pattern, needs: str = "images packed by length"
) -> list[str]:
    """What every kernel for ragged batches refuses.

    Args:
        inputs: The call.
        pattern: Its pattern.
        needs: The patterns that the kernel takes, in words.
    """
    reasons = []
    if not isinstance(pattern, Lengths):
        reasons.append(f"needs {needs}, got a {type(pattern).__name__} pattern")
    if inputs.q.device.type != "cuda":
        reasons.append(f"needs CUDA tensors, got {inputs.q.device.type}")
    if inputs.bias is not None:
        reasons.append("takes no mask of the host")
    if inputs.q.shape[-1] % 8 or inputs.v.shape[-1] != inputs.q.shape[-1]:
        reasons.append("needs head dims that are equal and a multiple of 8")
    return reasons + transform_refusals()


class Varlen(Kernel):
    """Packed images through torch's own `varlen_attn`; differentiable."""

    name = "varlen"
    summary = "ragged batches without padding on CUDA (torch's varlen_attn)"

    def why_unavailable(self) -> list[str]:
        if not torch.cuda.is_available():
            return ["needs a CUDA device"]
        if torch.compiler.is_compiling():
            return ["cannot be traced by torch.compile"]
        return [] if shim() is not None else ["this torch has no varlen_attn"]

    def why_not(self, inputs: AttentionInputs, pattern: Pattern) -> list[str]:
        reasons = self.why_unavailable() + ragged_refusals(inputs, pattern)
        if inputs.q.dtype not in VARLEN_DTYPES:
            reasons.append(f"needs half precision, got {inputs.q.dtype}")
        if inputs.dropout:
            reasons.append("has no dropout")
        if not inputs.scale > 0:
            reasons.append(f"needs a positive scale, got {inputs.scale}")
        return reasons

    def work(self, inputs: AttentionInputs, pattern: Pattern) -> Work:
        assert isinstance(pattern, Lengths)
        return lengths_work(CallShape.of(inputs), pattern, calls=1.0)

    def __call__(self, inputs: AttentionInputs, pattern: Pattern) -> Tensor:
        assert isinstance(pattern, Lengths)
        lengths = torch.tensor(pattern.lengths, dtype=torch.int32, device=inputs.q.device)
        ends = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
        q, k, v = (x[0].transpose(0, 1) for x in (inputs.q, inputs.k, inputs.v))
        attend = shim()
        assert attend is not None
        out = attend(q, k, v, ends, max(pattern.lengths), inputs.scale)
        return twice_differentiable(self.name, out.transpose(0, 1)[None], inputs, pattern)


class Shim:
    """One version of `varlen_attn`, called without any mask.

    The order of the tensors has stayed, the keywords have not: ``is_causal`` gave way to
    ``window_size``, and ``scale`` came later. Left out they all mean no mask, so only ``scale`` is
    passed on, and where a version has none the queries carry it.

    Args:
        function: That version's `varlen_attn`.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function: Callable[..., Tensor] = function
        self.takes_scale = "scale" in inspect.signature(function).parameters

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, ends: Tensor, longest: int, scale: float
    ) -> Tensor:
        """Attention of packed images.

        Args:
            q: Queries ``[N, H, D]`` of all images.
            k: Their keys.
            v: Their values.
            ends: Where the images start and end, ``[images + 1]``.
            longest: Tokens of the longest image.
            scale: Factor of QK^T.

        Returns:
            ``[N, H, D]``.
        """
        if self.takes_scale:
            return self.function(q, k, v, ends, ends, longest, longest, scale=scale)
        scaled = q * (scale * q.shape[-1] ** 0.5)  # `function` divides by that root
        return self.function(scaled, k, v, ends, ends, longest, longest)


@cache
def shim() -> Shim | None:
    """That of the installed torch, None where it has none."""
    # imported when it is needed first: that takes seconds
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return Shim(varlen_attn)
