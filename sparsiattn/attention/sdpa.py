"""Dense attention by the original SDPA, also while this library replaces it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsiattn.attention.derivatives import (
    differentiable_again,
    is_transformed,
    plain_attention,
)
from sparsiattn.attention.factored_bias import plain

_original: Callable[..., Tensor] = F.scaled_dot_product_attention


_FLAGS = threading.Lock()
"""Held while a setting of torch, which all threads share, is another one."""


def original_attention() -> Callable[..., Tensor]:
    """`F.scaled_dot_product_attention` as it was before this library replaced it."""
    return _original


def set_original_attention(function: Callable[..., Tensor]) -> None:
    """Set the function that this library's wrapper of SDPA replaced."""
    global _original
    _original = function


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    dropout: float = 0.0,
    causal: bool = False,
    *,
    scale: float | None = None,
    gqa: bool = False,
) -> Tensor:
    """The host's own attention; arguments as `F.scaled_dot_product_attention` takes them."""
    # enable_gqa only where it is needed: replacements of SDPA often lack the argument
    extra = {"enable_gqa": True} if gqa else {}
    return _original(q, k, v, plain(mask), dropout, causal, scale=scale, **extra)


def differentiable_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    dropout: float = 0.0,
    *,
    scale: float,
) -> Tensor:
    """torch's fused attention with all derivatives: second order, forward mode, `torch.func`."""
    recompute = partial(plain_attention, dropout=dropout, scale=scale)
    if is_transformed():
        return recompute(q, k, v, mask)
    out = dense_attention(q, k, v, mask, dropout, scale=scale)
    if dropout:  # only torch knows which weights it dropped
        return out
    return differentiable_again(out, recompute, q, k, v, mask)


@contextmanager
def without_plans(device: torch.device) -> Iterator[None]:
    """Leave out cuDNN for attention of shapes that seldom come again.

    On a GPU it plans every new shape, which takes longer than many calls. If the user allows no
    other implementation, it stays.

    Args:
        device: Device of the operands.
    """
    flags: Any = torch.backends.cuda
    others = (flags.flash_sdp_enabled, flags.mem_efficient_sdp_enabled, flags.math_sdp_enabled)
    if device.type != "cuda" or torch.compiler.is_compiling() or not any(on() for on in others):
        yield
        return
    with _FLAGS:
        before = flags.cudnn_sdp_enabled()
        flags.enable_cudnn_sdp(False)
        try:
            yield
        finally:
            flags.enable_cudnn_sdp(before)
