"""Ragged batches on CUDA without padding through torch's own `varlen_attn`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache, lru_cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from sparsiattn.attention import geometry
from sparsiattn.attention.inputs import AttentionInputs
from sparsiattn.attention.lengths import Lengths
from sparsiattn.attention.pattern import Pattern
from sparsiattn.kernels.base import Kernel
from sparsiattn.kernels.cost import CallShape
from sparsiattn.kernels.derivatives import transform_refusals, twice_differentiable
from sparsiattn.kernels.prices import Work
from sparsiattn.kernels.sdpa import lengths_work

VARLEN_DTYPES = (torch.float16, torch.bfloat16)


def ragged_refusals(
    inputs: AttentionInputs, pattern: Pattern, needs: str = "images packed by length"
) -> list[str]:
    """Reasons for which every kernel for ragged batches refuses a call.

    Args:
        inputs: The operands of the call.
        pattern: Its pattern.
        needs: Description of the patterns that the kernel takes, for the message.
    """
    reasons = []
    if not isinstance(pattern, Lengths):
        reasons.append(f"needs {needs}, got a {type(pattern).__name__} pattern")
    if inputs.q.device.type != "cuda":
        reasons.append(f"needs CUDA tensors, got {inputs.q.device.type}")
    if inputs.bias is not None:
        reasons.append("does not support the model's mask")
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
            reasons.append("does not support dropout")
        if not inputs.scale > 0:
            reasons.append(f"needs a positive scale, got {inputs.scale}")
        return reasons

    def work(self, inputs: AttentionInputs, pattern: Pattern) -> Work:
        assert isinstance(pattern, Lengths)
        return lengths_work(CallShape.of(inputs), pattern, calls=1.0)

    def __call__(self, inputs: AttentionInputs, pattern: Pattern) -> Tensor:
        assert isinstance(pattern, Lengths)
        # a fake tensor must not outlive its mode
        find = ends_of if type(inputs.q) is Tensor else ends_of.__wrapped__
        ends = find(pattern.lengths, inputs.q.device)
        geometry.hold_if_captured(ends, self.name, pattern.lengths, device=inputs.q.device)
        q, k, v = (x[0].transpose(0, 1) for x in (inputs.q, inputs.k, inputs.v))
        attend = shim()
        assert attend is not None
        out = attend(q, k, v, ends, max(pattern.lengths), inputs.scale)
        return twice_differentiable(self.name, out.transpose(0, 1)[None], inputs, pattern)


@lru_cache(maxsize=64)
def ends_of(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """Boundaries between images, int32 ``[images + 1]``, cached for the layers of a model."""
    # an inference tensor cached from one call would break later ones that train
    with torch.inference_mode(False):
        ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
        geometry.wait_for_values(device)
        return ends


class Shim:
    """Calls any version of `varlen_attn`, without a mask.

    Between versions the order of tensors is the same, but ``window_size`` replaced ``is_causal``,
    and ``scale`` was added. Without these keywords there is no mask, so only ``scale`` is passed;
    for versions that lack it, the queries are scaled instead.

    Args:
        function: The installed `varlen_attn`.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function: Callable[..., Tensor] = function
        self.takes_scale = "scale" in inspect.signature(function).parameters

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, ends: Tensor, longest: int, scale: float
    ) -> Tensor:
        """Attention of packed images.

        Args:
            q: Queries of all images, ``[N, H, D]``.
            k: Keys, ``[N, H, D]``.
            v: Values, ``[N, H, D]``.
            ends: Boundaries between images, ``[images + 1]``.
            longest: Number of tokens of the longest image.
            scale: Factor of QK^T.

        Returns:
            ``[N, H, D]``.
        """
        if self.takes_scale:
            return self.function(q, k, v, ends, ends, longest, longest, scale=scale)
        scaled = q * (scale * q.shape[-1] ** 0.5)  # `function` divides by this root
        return self.function(scaled, k, v, ends, ends, longest, longest)


@cache
def shim() -> Shim | None:
    """The `Shim` for the installed torch; None if it has no `varlen_attn`."""
    # imported on first use: the import takes seconds
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return Shim(varlen_attn)
