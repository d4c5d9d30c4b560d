"""Images as a case wants them."""

from __future__ import annotations

import torch
from torch import Tensor

from reliability.drawn import Given
from reliability.hosts import DTYPES, Host

WRONG = ("wrong channels", "wrong size", "wrong dtype", "wrong rank")


def make(given: Given, host: Host, dtype: str) -> Tensor:
    """``[B, 3, H, W]``, or what no model of that size takes."""
    generator = torch.Generator().manual_seed(given.seed)
    side = (16, 16) if host.family == "swin" else host.size
    x = torch.randn(given.batch, 3, *side, generator=generator).to(DTYPES[dtype])
    return _wrong(_laid_out(_odd(x, given.special), given.layout), given.special)


def _odd(x: Tensor, special: str) -> Tensor:
    """What is not finite is in the last image."""
    if special == "zeros":
        return torch.zeros_like(x)
    if special == "constant":
        return torch.ones_like(x)
    if special == "large":
        return x * 30
    value = float(special.split()[0]) if special.split()[0] in ("nan", "inf", "-inf") else None
    if value is not None and len(x):
        if special.endswith("pixel"):
            x[-1, 0, 0, 0] = value
        else:
            x[-1] = value
    return x


def _laid_out(x: Tensor, layout: str) -> Tensor:
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "strided":
        return x.repeat_interleave(2, dim=-1)[..., ::2]
    if layout == "flipped":
        return x.mT.contiguous().mT
    if layout == "expanded" and len(x):
        return x[-1:].expand_as(x)
    return x


def _wrong(x: Tensor, special: str) -> Tensor:
    if special == "wrong channels":
        return x[:, :1]
    if special == "wrong size":
        return torch.cat([x, x[..., :1]], dim=-1)
    if special == "wrong dtype":
        return x.to(torch.float32 if x.dtype == torch.float64 else torch.float64)
    if special == "wrong rank":
        return x.flatten(1)
    return x


def finite_images(x: Tensor) -> Tensor:
    """Which images ``[B]`` hold neither NaN nor infinity."""
    return x.isfinite().flatten(1).all(1)
