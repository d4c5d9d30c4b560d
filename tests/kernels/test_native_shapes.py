"""Shapes that plain self-attention does not have: shared key heads, other keys than queries."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparsiattn import AttentionInputs, Pattern, Site
from sparsiattn.attention import KeyLists, TopLogits
from sparsiattn.kernels import Native, Reference
from sparsiattn.strategies import finish

pytestmark = pytest.mark.usefixtures("compiled_native")

Grid = tuple[int, int]
GRIDS = st.tuples(st.integers(1, 9), st.integers(2, 9))


def operands(
    grid: Grid, key_grid: Grid, prefix: int, dims: tuple[int, int], heads: tuple[int, int],
    tile: object, seed: int, bias: bool,
) -> AttentionInputs:  # fmt: skip
    """Heads of keys are shared by ``heads[1]`` heads of queries each."""
    generator = torch.Generator().manual_seed(seed)
    (dim, width), (shared, each) = dims, heads
    rows, columns = (g[0] * g[1] + prefix for g in (grid, key_grid))
    q = torch.randn(2, rows, shared * each, dim, generator=generator).transpose(1, 2)
    k, v = (
        torch.randn(2, columns, shared, 1, size, generator=generator)
        .permute(0, 2, 3, 1, 4)
        .expand(-1, -1, each, -1, -1)
        .flatten(1, 2)
        for size in (dim, width)
    )
    added = torch.randn(1, shared * each, rows, columns, generator=generator) if bias else None
    site = Site.of(
        q, k, v, prefix_tokens=prefix, grid=grid, key_grid=key_grid,
        bias="bias" if bias else "none",
    )  # fmt: skip
    return AttentionInputs(q, k, v, dim**-0.5, added, site, tile=tile)  # type: ignore[arg-type]


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    grid=GRIDS,
    key_grid=GRIDS,
    prefix=st.integers(0, 2),
    dims=st.tuples(st.integers(1, 256), st.integers(1, 256)),
    heads=st.tuples(st.integers(1, 2), st.integers(1, 3)),
    tile=st.sampled_from([1, (2, 2), (4, 3), (8, 8)]),
    share=st.floats(0.02, 0.98),
    background=st.sampled_from([None, 2, 4]),
    bias=st.booleans(),
    voted=st.booleans(),
    seed=st.integers(0, 999),
)
def test_equals_the_reference(
    grid: Grid, key_grid: Grid, prefix: int, dims: tuple[int, int], heads: tuple[int, int],
    tile: object, share: float, background: int | None, bias: bool, voted: bool, seed: int,
) -> None:  # fmt: skip
    inputs = operands(grid, key_grid, prefix, dims, heads, tile, seed, bias)
    keep = min(prefix + max(1, round(share * inputs.n_keys)), inputs.n_keys - 1)
    scores = torch.rand(2, inputs.q.shape[1], inputs.n_queries, inputs.n_keys)
    wish = TopLogits.of(inputs, keep) if voted else Pattern.top(scores, keep)
    with torch.no_grad():
        pattern = finish(wish, inputs, background=background)
    assert isinstance(pattern, KeyLists)
    assert Native().why_not(inputs, pattern) == []
    found = Native()(inputs, pattern)
    torch.testing.assert_close(found, Reference()(inputs, pattern), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("dim", [16, 24, 32, 64, 72, 80, 96, 128, 192, 256])
@pytest.mark.parametrize("tile", [1, (8, 8)], ids=["rows", "tiles"])
def test_head_dims(dim: int, tile: object) -> None:
    inputs = operands((17, 16), (17, 16), 1, (dim, dim), (2, 2), tile, 0, bias=True)
    with torch.no_grad():
        pattern = finish(TopLogits.of(inputs, 0.1), inputs, background=5)
    found = Native()(inputs, pattern)
    torch.testing.assert_close(found, Reference()(inputs, pattern), rtol=1e-4, atol=2e-5)
