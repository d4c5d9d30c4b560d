"""Ragged batches on CUDA without padding: xformers' block-diagonal mask, torch's `varlen_attn`."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsiattn.cost import Call, Work
from sparsiattn.kernel import Kernel
from sparsiattn.kernels.sdpa import lengths_work
from sparsiattn.patterns import Lengths, Pattern
from sparsiattn.site import AttentionInputs


def _refusals(inputs: AttentionInputs, pattern: Pattern) -> list[str]:
    """What both kernels refuse."""
    found = []
    if not isinstance(pattern, Lengths):
        found.append(f"needs images packed by length, got a {type(pattern).__name__} pattern")
    if inputs.q.device.type != "cuda":
        found.append(f"needs CUDA tensors, got {inputs.q.device.type}")
    if inputs.bias is not None:
        found.append("takes no mask of the host")
    if inputs.q.shape[-1] % 8 or inputs.v.shape[-1] != inputs.q.shape[-1]:
        found.append("needs head dims that are equal and a multiple of 8")
    return found


class XFormers(Kernel):
    """Packed images through xformers' memory-efficient attention (`BlockDiagonalMask`)."""

    name = "xformers"
    summary = "ragged batches without padding on CUDA (xformers' block-diagonal mask)"

    def unavailable(self) -> list[str]:
        if not torch.cuda.is_available():
            return ["needs a CUDA device"]
        return [] if _xformers() is not None else ["xformers is not installed"]

    def why_not(self, inputs: AttentionInputs, pattern: Pattern) -> list[str]:
        return self.unavailable() + _refusals(inputs, pattern)

    def work(self, inputs: AttentionInputs, pattern: Pattern) -> Work:
        assert isinstance(pattern, Lengths)
        return lengths_work(Call.of(inputs), pattern, calls=1.0)

    def __call__(self, inputs: AttentionInputs, pattern: Pattern) -> Tensor:
        assert isinstance(pattern, Lengths)
        ops = _xformers()
        mask = ops.fmha.attn_bias.BlockDiagonalMask.from_seqlens(list(pattern.lengths))
        q, k, v = (x.transpose(1, 2) for x in (inputs.q, inputs.k, inputs.v))
        out: Tensor = ops.memory_efficient_attention(
            q, k, v, attn_bias=mask, p=inputs.dropout, scale=inputs.scale
        )
        return out.transpose(1, 2)


@cache
def _xformers() -> Any:
    """xformers.ops, or None where it cannot be imported (absent, or built for another torch)."""
    try:
        import xformers.ops
    except (ImportError, OSError):
        return None
    return xformers.ops


class Varlen(Kernel):
    """Packed images through torch's own `varlen_attn`."""

    name = "varlen"
    summary = "ragged batches without padding on CUDA (torch's varlen_attn)"

    def unavailable(self) -> list[str]:
        if not torch.cuda.is_available():
            return ["needs a CUDA device"]
        return [] if _varlen_attn() is not None else ["this torch has no varlen_attn"]

    def why_not(self, inputs: AttentionInputs, pattern: Pattern) -> list[str]:
        found = self.unavailable() + _refusals(inputs, pattern)
        if inputs.q.dtype not in (torch.float16, torch.bfloat16):
            found.append(f"needs half precision, got {inputs.q.dtype}")
        if inputs.dropout:
            found.append("has no dropout")
        return found

    def work(self, inputs: AttentionInputs, pattern: Pattern) -> Work:
        assert isinstance(pattern, Lengths)
        return lengths_work(Call.of(inputs), pattern, calls=1.0)

    def __call__(self, inputs: AttentionInputs, pattern: Pattern) -> Tensor:
        assert isinstance(pattern, Lengths)
        lengths = torch.tensor(pattern.lengths, dtype=torch.int32, device=inputs.q.device)
        ends = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
        # older versions have no scale argument, so the query carries it
        scaled = inputs.q * (inputs.scale * inputs.q.shape[-1] ** 0.5)
        q, k, v = (x[0].transpose(0, 1) for x in (scaled, inputs.k, inputs.v))
        longest = max(pattern.lengths)
        out: Tensor = _varlen_attn()(q, k, v, ends, ends, longest, longest)
        return out.transpose(0, 1)[None]


@cache
def _varlen_attn() -> Any:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn
