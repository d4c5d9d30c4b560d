"""Binary block masking: equal to the masked reference for every mask."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import sparsiattn
from sparsiattn import AttentionInputs, Pattern, Site, Strategy, block_mask
from sparsiattn.errors import InvalidOption, InvalidType
from sparsiattn.kernels import Flex, Gather, MaskedSDPA, Reference
from sparsiattn.methods.block_masks import BlockMask
from sparsiattn.strategies import finish
from sparsiattn.testing import tiny_images, tiny_vit


def operands(nq: int, nk: int, *, batch: int = 2, heads: int = 3, prefix: int = 0) -> Any:
    site = Site(
        name="site", index=0, depth=1, tokens=nq, keys=nk, heads=heads, head_dim=8, value_dim=6,
        grid=(1, nq - prefix), key_grid=(1, nk - prefix), prefix_tokens=prefix,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(batch, heads, n, d, generator=generator) for n, d in ((nq, 8), (nk, 8), (nk, 6))
    )
    return AttentionInputs(q, k, v, 0.35, None, site)


def blocky(shape: tuple[int, ...], density: float, seed: int) -> Tensor:
    """A random mask with holes and full stretches, so that all kinds of tiles occur."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = shape[-2:]
    coarse = torch.rand(*shape[:2], rows // 5 + 1, columns // 5 + 1, generator=generator)
    kept = coarse.repeat_interleave(5, -2).repeat_interleave(5, -1)[..., :rows, :columns] < density
    return kept & (torch.rand(shape, generator=generator) < 0.97) | (coarse[:1, :1, :1, :1] > 2)


def check(pattern: BlockMask, inputs: AttentionInputs) -> None:
    assert Gather().why_not(inputs, pattern) == []
    expected = Reference()(inputs, Pattern.mask(pattern.keep))
    torch.testing.assert_close(Gather()(inputs, pattern), expected, rtol=1e-4, atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(
    nq=st.integers(1, 40), nk=st.integers(1, 40), tile=st.integers(1, 17),
    block=st.integers(1, 17), lead=st.sampled_from([(1, 1), (2, 1), (1, 3), (2, 3)]),
    density=st.sampled_from([0.0, 0.1, 0.5, 1.0]), seed=st.integers(0, 99),
)  # fmt: skip
def test_equals_the_masked_reference(
    nq: int, nk: int, tile: int, block: int, lead: tuple[int, int], density: float, seed: int
) -> None:
    mask = blocky((*lead, nq, nk), density, seed)
    pattern = block_mask(Pattern.mask(mask), tile=tile, block=block)  # type: ignore[arg-type]
    assert torch.equal(pattern.to_mask(), mask)
    check(pattern, operands(nq, nk))


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(1, 40), tile=st.integers(1, 17), block=st.integers(1, 17),
    density=st.sampled_from([0.0, 0.1, 0.5, 1.0]), seed=st.integers(0, 99),
)  # fmt: skip
def test_reordered_equals_the_masked_reference(
    n: int, tile: int, block: int, density: float, seed: int
) -> None:
    pytest.importorskip("scipy")
    pattern = block_mask(blocky((1, 3, n, n), density, seed), tile=tile, block=block, reorder=True)
    assert pattern.order is not None
    assert pattern.order.sort().values.tolist() == list(range(n))
    check(pattern, operands(n, n))


@pytest.mark.parametrize("reorder", [False, True])
def test_gradients_equal_the_reference(reorder: bool) -> None:
    if reorder:
        pytest.importorskip("scipy")
    mask = blocky((1, 3, 37, 37), 0.3, 1)
    mask[..., 5, :] = False
    grads = []
    for kernel, pattern in (
        (Reference(), Pattern.mask(mask)),
        (Gather(), block_mask(mask, tile=8, block=4, reorder=reorder)),
    ):
        inputs = operands(37, 37)
        leaves = [x.requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
        grads.append(torch.autograd.grad(kernel(inputs, pattern).square().sum(), leaves))
    for expected, got in zip(*grads, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_counts_of_empty_full_and_diagonal_masks() -> None:
    empty = block_mask(torch.zeros(1, 1, 64, 64, dtype=torch.bool), tile=16, block=16)
    assert (empty.active, empty.full, empty.buckets) == (0, 0, ())
    full = block_mask(torch.ones(1, 1, 60, 64, dtype=torch.bool), tile=16, block=16)
    assert (full.active, full.full) == (16, 16)  # a ragged last row of tiles can be full
    assert all(bucket.bias.shape[-1] == 0 for bucket in full.buckets)
    diagonal = block_mask(torch.eye(64, dtype=torch.bool)[None, None], tile=16, block=16)
    assert (diagonal.active, diagonal.full) == (4, 0)
    assert diagonal.active_macs(10) == diagonal.computed_macs(10) == 4 * 256 * 10
    assert diagonal.ideal_macs(10) == 64 * 10


def test_one_dense_row_does_not_lengthen_the_other_lists() -> None:
    mask = torch.eye(128, dtype=torch.bool)
    mask[0] = True
    pattern = block_mask(mask[None, None], tile=16, block=16)
    assert pattern.active == 8 + 7
    assert pattern.computed_macs(1) == pattern.active_macs(1)


def test_reordering_gathers_a_hidden_band() -> None:
    pytest.importorskip("scipy")
    place = torch.randperm(256, generator=torch.Generator().manual_seed(0))
    mask = ((place[:, None] - place).abs() < 3)[None, None]
    plain, ordered = (block_mask(mask, tile=16, block=16, reorder=r) for r in (False, True))
    assert plain.active == 256 or plain.active > 240
    assert ordered.active < 60
    check(ordered, operands(256, 256, batch=1))


def test_what_kernels_say() -> None:
    inputs = operands(20, 20)
    pattern = block_mask(torch.eye(20, dtype=torch.bool)[None, None], tile=8, block=8)
    assert "got a BlockMask pattern" in Flex().why_not(inputs, pattern)[0]
    assert MaskedSDPA().why_not(inputs, pattern) == []
    expected = Reference()(inputs, pattern)
    torch.testing.assert_close(MaskedSDPA()(inputs, pattern), expected, rtol=1e-4, atol=1e-5)
    hosted = inputs.replace(bias=torch.zeros(1, 1, 20, 20))
    assert "host mask" in Gather().why_not(hosted, pattern)[0]
    pooled = finish(pattern, inputs, background=2)
    assert "background" in Gather().why_not(inputs, pooled)[0]


def test_prefix_tokens_keep_the_block_form() -> None:
    inputs = operands(33, 33, prefix=1)
    pattern = block_mask(torch.eye(33, dtype=torch.bool)[None, None], tile=8, block=8)
    done = finish(pattern, inputs)
    assert isinstance(done, BlockMask)
    assert done.to_mask()[0, 0, :, 0].all()
    assert done.to_mask()[0, 0, 0].all()
    assert finish(done, inputs) is done
    check(done, inputs)


def test_a_strategy_that_returns_block_masks_equals_its_mask() -> None:
    @dataclass(frozen=True)
    class Band(Strategy):
        name = "band-of-a-test"
        blocks: bool = True

        def plan(self, inputs: AttentionInputs) -> Pattern:
            at = torch.arange(inputs.n_keys)
            mask = ((at[:, None] - at).abs() < 4)[None, None]
            return block_mask(mask, tile=8, block=8) if self.blocks else Pattern.mask(mask)

    results = []
    for blocks, kernel in ((True, "gather"), (False, "reference")):
        model, images = tiny_vit(), tiny_images()
        sparsiattn.patch(model, Band(blocks=blocks), kernel=kernel)
        with torch.no_grad():
            results.append(model(images))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reorder", [False, True])
def test_masks_that_depend_on_the_image_can_be_patched(reorder: bool) -> None:
    if reorder:
        pytest.importorskip("scipy")

    @dataclass(frozen=True)
    class Positive(Strategy):
        name = "positive-of-a-test"
        blocks: bool = True

        def plan(self, inputs: AttentionInputs) -> Pattern:
            mask = inputs.q @ inputs.k.mT > 0
            return (
                block_mask(mask, tile=8, block=8, reorder=reorder)
                if self.blocks
                else (Pattern.mask(mask))
            )

    results = []
    for blocks, kernel in ((True, "gather"), (False, "reference")):
        model, images = tiny_vit(), tiny_images()
        sparsiattn.patch(model, Positive(blocks=blocks), kernel=kernel)
        with torch.no_grad():
            results.append(model(images))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)


def test_errors_say_what_was_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidType, match="boolean"):
        block_mask(torch.ones(1, 1, 4, 4))
    mask = torch.ones(1, 1, 4, 5, dtype=torch.bool)
    with pytest.raises(InvalidOption, match="tile must be"):
        block_mask(mask, tile=0)
    with pytest.raises(InvalidOption, match="as many queries as keys"):
        block_mask(mask, reorder=True)
    monkeypatch.setitem(sys.modules, "scipy.sparse", None)
    with pytest.raises(InvalidOption, match="SciPy"):
        block_mask(mask[..., :4], reorder=True)
