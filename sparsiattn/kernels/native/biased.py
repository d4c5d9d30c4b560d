"""Dense attention with one bias per key, in compiled code.

It weighs merged tokens by their size. torch's fused attention would treat such a bias as a full
mask.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sparsiattn.attention.derivatives import is_tracing, is_unobserved
from sparsiattn.kernels.native import build, entries
from sparsiattn.kernels.native.ops import (
    FLOP_FORMULAS,
    addresses_of,
    parallel,
    with_rows,
)
from sparsiattn.kernels.native.scores import serves

# as in vectors.h
WIDEST = 256

_KEY_BIASED = "sparsiattn::native_key_biased"
torch.library.define(
    _KEY_BIASED, "(Tensor q, Tensor k, Tensor v, Tensor bias, float scale) -> Tensor"
)


def _key_biased(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> Tensor:
    """softmax(scale * QK^T + bias) V.

    Args:
        q: Queries ``[B, H, N, D]`` float32 of any strides, D at most 256.
        k: Keys ``[B, H, N, D]``.
        v: Values ``[B, H, N, Dv]``.
        bias: Added to the logits of each key, ``[B, N]`` float32.
        scale: Factor of QK^T.

    Returns:
        ``[B, H, N, Dv]``; rows without any key are zero.
    """
    q, k, v, bias = with_rows(q), with_rows(k), with_rows(v), bias.contiguous()
    (b, h, n, d), width = q.shape, v.shape[-1]
    # [B, N, H, Dv] in memory, so that the host's reshape copies nothing
    out = torch.empty_strided((b, h, n, width), (n * h * width, width, h * width, 1))
    steps = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3])
    numbers = (b, h, n, d, width, *steps, torch.get_num_threads())
    addresses = addresses_of(q, k, v, out, bias)
    build.code().biased(entries.BIASED_CALL.pack(*numbers, *addresses, parallel(), scale))
    return out


torch.library.impl(_KEY_BIASED, "CPU", _key_biased)


@torch.library.register_fake(_KEY_BIASED)  # type: ignore[untyped-decorator]
def _key_biased_shape(q: Tensor, k: Tensor, v: Tensor, *others: object) -> Tensor:
    b, h, n, _ = q.shape
    return q.new_empty(b, n, h, v.shape[-1]).transpose(1, 2)


def _key_biased_flops(q_shape: Any, k_shape: Any, v_shape: Any, *_: Any, **options: Any) -> int:
    """FLOPs of QK^T and AV."""
    return int(2 * math.prod(q_shape[:3]) * k_shape[-2] * (q_shape[-1] + v_shape[-1]))


FLOP_FORMULAS[torch.ops.sparsiattn.native_key_biased] = _key_biased_flops


def serves_call(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether `key_biased` takes these operands: float32 on a CPU, no gradients, self-attention."""
    fits = q.dim() == 4 and q.shape == k.shape and q.shape[:3] == v.shape[:3]
    fits = fits and max(q.shape[-1], v.shape[-1]) <= WIDEST
    return fits and not is_tracing() and serves(q, k, v)


def key_biased(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> Tensor:
    """The operator ``native_key_biased``, called directly where nothing observes operators."""
    if type(v) is Tensor and is_unobserved(q, k):
        return _key_biased(q, k, v, bias, scale)
    operator = torch.ops.sparsiattn.native_key_biased.default
    return operator(q, k, v, bias, scale)  # type: ignore[no-any-return]
