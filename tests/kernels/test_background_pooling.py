"""Means over the cells of the background in half precision, as a GPU computes them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from sparsiattn.attention import geometry
from sparsiattn.attention.background import CountedSummary, Summary, key_cells, key_counts

HALF = [torch.float16, torch.bfloat16]


def summary(grid: tuple[int, int], prefix: int = 1, allowed: torch.Tensor | None = None) -> Summary:
    """Of 2 x 2 cells; prefix keys belong to none."""
    cells = geometry.cell_ids(grid, (2, 2), device=torch.device("cpu"))
    cells = torch.cat([cells.new_full((prefix,), 4), cells])
    return Summary(cells, (2, 2), torch.zeros(1, 1, 1, 4), allowed)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("grid", [(14, 14), (26, 26), (37, 37), (74, 74)])
def test_means_are_neither_larger_nor_smaller(grid: tuple[int, int], dtype: torch.dtype) -> None:
    """Whatever the number of keys: 1 / 49 has no exact value in half precision."""
    background = summary(grid)
    x = torch.randn(2, 3, len(background.cells), 64, generator=torch.Generator().manual_seed(0))
    x = (x + 1.0).to(dtype)
    found, wanted = background.pool(x), background.pool(x.double())
    assert found.dtype == dtype
    scale = (found.double() * wanted).sum((0, 1, 3)) / wanted.square().sum((0, 1, 3))
    torch.testing.assert_close(scale, torch.ones_like(scale), rtol=0, atol=4e-4)


def test_sums_do_not_overflow() -> None:
    background = summary((64, 64))
    x = torch.full((1, 1, 4097, 8), 96.0, dtype=torch.float16)
    assert torch.equal(background.pool(x), torch.full((1, 1, 4, 8), 96.0, dtype=torch.float16))


@pytest.mark.parametrize("dtype", HALF)
def test_forbidden_keys_do_not_enter(dtype: torch.dtype) -> None:
    """And a cell without any allowed key is zero, as in float32."""
    allowed = torch.rand(2, 1, 1, 50, generator=torch.Generator().manual_seed(0)) > 0.4
    background = summary((7, 7), allowed=allowed)
    allowed[1, ..., background.cells == 2] = False
    x = torch.randn(2, 3, 50, 8, generator=torch.Generator().manual_seed(1))
    wanted = background.pool(x)
    assert (wanted[1, :, 2] == 0).all()
    found = background.pool(x.to(dtype))
    assert torch.equal(found[1, :, 2], torch.zeros(3, 8, dtype=dtype))
    torch.testing.assert_close(found.float(), wanted, rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", HALF)
def test_gradients_reach_the_keys(dtype: torch.dtype) -> None:
    x = torch.randn(1, 1, 50, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
    half = x.detach().to(dtype).requires_grad_()
    grads = [torch.autograd.grad(summary((7, 7)).pool(y).float().sum(), y)[0] for y in (x, half)]
    torch.testing.assert_close(grads[1].float(), grads[0], rtol=1e-2, atol=1e-4)


SIDES = st.tuples(st.integers(1, 20), st.integers(1, 20))


@given(SIDES, SIDES, st.integers(0, 3), st.sampled_from([torch.float32, *HALF]))
@example((16, 8), (4, 2), 1, torch.bfloat16)
def test_cached_weights_are_those_of_the_cells(
    grid: tuple[int, int], parts: tuple[int, int], prefix: int, dtype: torch.dtype
) -> None:
    """To the last bit, also where every count is a power of two and the division is left out."""
    cells = key_cells(grid, parts, prefix, device=torch.device("cpu"))
    bias = torch.zeros(1, 1, 1, parts[0] * parts[1])
    x = torch.randn(2, 1, len(cells), 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = Summary(cells, parts, bias, source=(grid, prefix)).pool(x)
    assert torch.equal(found, Summary(cells, parts, bias).pool(x))
    counts = key_counts(grid, parts, prefix, device=torch.device("cpu"))
    assert torch.equal(counts, cells.bincount(minlength=len(counts)).float())


def test_a_bias_that_is_counted_late_is_traced() -> None:
    """In one graph, also before Python 3.12, whose `cached_property` holds a lock."""
    cells = key_cells((2, 2), (2, 2), 0, device=torch.device("cpu"))

    def program(counts: torch.Tensor) -> torch.Tensor:
        background = CountedSummary(cells, (2, 2), counts.log)
        assert background.counted
        return background.bias + background.bias

    counts = torch.arange(4.0)
    found = torch.compile(program, backend="eager", fullgraph=True)(counts)
    assert torch.equal(found, 2 * counts.log())
    torch.compiler.reset()
