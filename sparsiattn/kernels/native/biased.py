"""Attention of all tokens to all with a logit for every key, by compiled code.

So merged tokens weigh by their size. Torch's fused attention takes such a bias for a whole mask.
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
        q: Queries ``[B, H, N, D]`` float32 of any strides, heads up to 256 wide.
        k: Keys, as many.
        v: Values ``[B, H, N, Dv]``.
        bias: Logit of every key, ``[B, N]`` float32.
        scale: Factor of QK^T.

    Returns:
        ``[B, H, N, Dv]``; zeros where a row sees no key.
    """
    q, k, v, bias = with_rows(q), with_rows(k), with_rows(v), bias.contiguous()
    (b, h, n, d), width = q.shape, v.shape[-1]
    # [B, N, H, Dv] in memory, which the host's reshape need not copy
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
    """Those of both products."""
    return int(2 * math.prod(q_shape[:3]) * k_shape[-2] * (q_shape[-1] + v_shape[-1]))


FLOP_FORMULAS[torch.ops.sparsiattn.native_key_biased] = _key_biased_flops


def serves_call(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether `key_biased` may take these operands: float32 on a CPU without a gradient, all tokens
    among themselves."""
    fits = q.dim() == 4 and q.shape == k.shape and q.shape[:3] == v.shape[:3]
    fits = fits and max(q.shape[-1], v.shape[-1]) <= WIDEST
    return fits and not is_tracing() and serves(q, k, v)


def key_biased(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> Tensor:
    """As the operator ``native_key_biased``."""
    if type(v) is Tensor and is_unobserved(q, k):
        return _key_biased(q, k, v, bias, scale)
    operator = torch.ops.sparsiattn.native_key_biased.default
    return operator(q, k, v, bias, scale)  # type: ignore[no-any-return]
