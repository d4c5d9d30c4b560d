"""Calls of the native kernel, and that it answers them as the reference does."""

from __future__ import annotations

import torch

from sparsiattn import AttentionInputs, Pattern, Site
from sparsiattn.kernels import Native, Reference
from sparsiattn.strategies import finish

KERNEL = Native()


def call(
    grid: tuple[int, int], tile: object, block: object, *, dim: int = 16, value_dim: int = 16,
    prefix: int = 1, k: float = 0.4, background: int | None = 2, heads: int = 2, seed: int = 0,
) -> tuple[AttentionInputs, Pattern]:  # fmt: skip
    """Operands laid out as a host's, and a pattern from random scores."""
    n = grid[0] * grid[1] + prefix
    generator = torch.Generator().manual_seed(seed)
    packed = torch.randn(2, n, heads, 2 * dim + value_dim, generator=generator).transpose(1, 2)
    q, key, v = packed.split((dim, dim, value_dim), dim=-1)
    site = Site.of(q, key, v, prefix_tokens=prefix, grid=grid, key_grid=grid)
    inputs = AttentionInputs(
        q, key, v, dim**-0.5, None, site, tile=tile, block=block  # type: ignore[arg-type]
    )  # fmt: skip
    scores = torch.rand(2, heads, n, n, generator=generator)
    return inputs, finish(Pattern.top(scores, k), inputs, background=background)


def same(inputs: AttentionInputs, pattern: Pattern, rtol: float = 1e-4) -> None:
    assert KERNEL.why_not(inputs, pattern) == []
    found, exact = KERNEL(inputs, pattern), Reference()(inputs, pattern)
    torch.testing.assert_close(found, exact, rtol=rtol, atol=rtol / 10)
    # the host's reshape to [B, N, H * D] copies nothing
    assert found.transpose(1, 2).is_contiguous()
