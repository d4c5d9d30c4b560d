"""Patterns and kernels against oracles written with plain loops."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import softmax
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import sparsiattn
from sparsiattn import AttentionInputs, Pattern
from sparsiattn.attention import KeyIndex, count_of
from sparsiattn.kernels import Gather, Reference, sparsiattn_kernels
from sparsiattn.strategies import Connectivity, finish
from sparsiattn.testing import random_inputs

# those that compute any mask on any device
HERE = [kernel for kernel in sparsiattn_kernels() if kernel.name in ("reference", "sdpa", "gather")]
Cells = dict[int, list[int]]


def cells_of(grid: tuple[int, int], g: int, prefix: int) -> Cells:
    """Cell to key ids by plain arithmetic; a single row of tokens has its g * g cells in a row."""
    found: Cells = {}
    parts = (min(g, grid[0]), min(g, grid[1])) if grid[0] > 1 else (1, min(g * g, grid[1]))
    for row in range(grid[0]):
        for column in range(grid[1]):
            cell = (row * parts[0] // grid[0]) * parts[1] + column * parts[1] // grid[1]
            found.setdefault(cell, []).append(prefix + row * grid[1] + column)
    return found


def by_loops(inputs: AttentionInputs, mask: Tensor, g: int | None) -> Tensor:
    """Attention over a mask, one query at a time, dropped keys pooled as the design says: mean key
    and value of each cell over the keys the host allows, logit plus log count plus mean bias."""
    q, k, v = (x.double() for x in (inputs.q, inputs.k, inputs.v))
    batch, heads, n, _ = q.shape
    mask = mask.expand(batch, heads, n, -1)
    bias = torch.zeros(batch, heads, n, k.shape[2], dtype=torch.float64)
    allowed = torch.ones_like(bias, dtype=torch.bool)
    if inputs.bias is not None and inputs.bias.dtype == torch.bool:
        allowed = inputs.bias.expand_as(allowed)
    elif inputs.bias is not None:
        bias = inputs.bias.double().expand_as(bias)
        allowed = bias > -50 if inputs.site.bias == "mask" else allowed
    cells = {} if g is None else cells_of(inputs.key_grid, g, inputs.prefix)
    out = torch.zeros(batch, heads, n, v.shape[-1], dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            for i in range(n):
                at = b, h, i
                out[at] = _row(q[at], k[b, h], v[b, h], inputs.scale, bias[at], allowed[at],
                               mask[at], cells)  # fmt: skip
    return out


def _row(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor, allowed: Tensor,
         mask: Tensor, cells: Cells) -> Tensor:  # fmt: skip
    logits, values = [], []
    for j in range(len(k)):
        if mask[j] and allowed[j]:
            logits.append(float(q @ k[j]) * scale + float(bias[j]))
            values.append(v[j])
    for members in cells.values():
        seen = [j for j in members if allowed[j]]
        dropped = [j for j in seen if not mask[j]]
        if dropped:
            mean_bias = float(bias[dropped].mean())
            logit = float(q @ k[seen].mean(0)) * scale + math.log(len(dropped)) + mean_bias
            logits.append(logit)
            values.append(v[seen].mean(0))
    if not logits:
        return torch.zeros(v.shape[-1], dtype=torch.float64)
    weights = torch.from_numpy(softmax(logits))
    return (weights[:, None] * torch.stack(values)).sum(0)


def host_mask(kind: str, inputs: AttentionInputs) -> AttentionInputs:
    n, generator = inputs.n_keys, torch.Generator().manual_seed(9)
    if kind == "none":
        return inputs
    if kind == "bias":
        bias = torch.randn(1, inputs.q.shape[1], n, n, generator=generator)
        return replace(inputs, bias=bias, site=replace(inputs.site, bias="bias"))
    if kind == "padding":
        bias = torch.rand(inputs.q.shape[0], 1, 1, n, generator=generator) > 0.4
    elif kind == "bool":
        bias = (torch.rand(1, 1, n, n, generator=generator) > 0.4) | torch.eye(n).bool()
    else:
        bias = torch.where(torch.rand(1, 1, n, n, generator=generator) > 0.4, 0.3, -100.0)
    return replace(inputs, bias=bias, site=replace(inputs.site, bias="mask"))


@settings(max_examples=40, deadline=None)
@given(
    grid=st.tuples(st.integers(1, 4), st.integers(1, 5)),
    prefix=st.integers(0, 2),
    tile=st.sampled_from([1, (2, 2), (1, 3)]),
    block=st.sampled_from([1, (2, 2), (1, 2)]),
    g=st.sampled_from([None, 1, 2, 3]),
    k=st.floats(0.05, 1.0),
    kind=st.sampled_from(["none", "bias", "padding", "bool", "shift"]),
)
def test_every_kernel_equals_plain_loops(
    grid: tuple[int, int],
    prefix: int,
    tile: object,
    block: object,
    g: int | None,
    k: float,
    kind: str,
) -> None:
    inputs = random_inputs(grid, prefix=prefix, tile=tile, block=block, batch=2, heads=2, dim=4)
    inputs = host_mask(kind, inputs)
    n = inputs.n_keys
    scores = torch.randn(2, 2, n, n, generator=torch.Generator().manual_seed(7))
    pattern = finish(Pattern.top(scores, k), inputs, background=g)
    mask = pattern.to_mask()
    dense = mask.all()
    exact = by_loops(inputs, mask, None if dense else g)
    for kernel in HERE:
        if not kernel.why_not(inputs, pattern):
            out = kernel(inputs, pattern).double()
            torch.testing.assert_close(
                out, exact, rtol=1e-4, atol=1e-5, msg=f"{kernel.name}: {{}}".format
            )


@pytest.mark.parametrize("kind", ["none", "bias", "bool"])
@pytest.mark.parametrize("g", [None, 2])
def test_mask_patterns_equal_plain_loops(kind: str, g: int | None) -> None:
    inputs = host_mask(kind, random_inputs((3, 4), heads=2, dim=4))
    keep = torch.rand(2, 1, 13, 13, generator=torch.Generator().manual_seed(1)) > 0.6
    pattern = finish(Pattern.mask(keep), inputs, background=g)
    exact = by_loops(inputs, pattern.to_mask(), g)
    torch.testing.assert_close(Reference()(inputs, pattern).double(), exact, rtol=1e-4, atol=1e-5)


def test_masked_keys_cannot_leak_into_the_background() -> None:
    """A padded image's garbage must not enter any mean, count or output."""
    inputs = random_inputs((4, 4), prefix=0, batch=1)
    bias = (torch.arange(16) < 10).view(1, 1, 1, 16)
    inputs = replace(inputs, bias=bias, site=replace(inputs.site, bias="mask"))
    wild = [torch.where(bias.mT, x, 1e4) for x in (inputs.k, inputs.v)]
    other = inputs.replace(k=wild[0], v=wild[1])
    scores = torch.randn(1, 1, 16, 16)
    for tile in (1, (2, 2)):
        for kernel in HERE:
            outs = []
            for call in (inputs.replace(tile=tile), other.replace(tile=tile)):
                pattern = finish(Pattern.top(scores, 4), call, background=2)
                outs.append(kernel(call, pattern))
            torch.testing.assert_close(outs[0], outs[1])


def test_prefix_columns_come_within_the_budget() -> None:
    inputs = random_inputs((4, 4), prefix=2)
    scores = torch.arange(18.0).expand(1, 1, 18, 18)
    mask = finish(Pattern.top(scores, 5), inputs).to_mask()
    assert mask[..., :2].all()
    assert (mask[..., 2:, :].sum(-1) == 5).all()
    assert mask[..., :2, :].all()
    free = finish(Pattern.top(scores, 5), inputs, prefix_keys=False).to_mask()
    assert not free[..., 2:, :2].any()


@settings(max_examples=100, deadline=None)
@given(k=st.floats(1e-6, 1.0), n=st.integers(1, 5000))
def test_budgets_round_up(k: float, n: int) -> None:
    assert count_of(k, n) == max(1, min(n, math.ceil(k * n)))
    assert count_of(n + 3, n) == n


def test_top_counts_and_order() -> None:
    scores = torch.randn(2, 3, 7, 11)
    mask = Pattern.top(scores, 0.3).to_mask()
    assert (mask.sum(-1) == 4).all()
    least_kept = scores.masked_fill(~mask, math.inf).amin(-1)
    best_dropped = scores.masked_fill(mask, -math.inf).amax(-1)
    assert (least_kept >= best_dropped).all()


def test_dropout_is_applied_in_training_and_unbiased() -> None:
    inputs = random_inputs((4, 4), batch=1, dim=4).replace(dropout=0.5)
    pattern = finish(Pattern.top(torch.randn(1, 3, 17, 17), 6), inputs, background=2)
    exact = Reference()(inputs.replace(dropout=0.0), pattern)
    for kernel in HERE:
        draws = torch.stack([kernel(inputs, pattern) for _ in range(1500)])
        assert draws.std(0).max() > 0.1, kernel.name
        error = (draws.mean(0) - exact).abs() / (draws.std(0) / 1500**0.5 + 1e-6)
        assert error.max() < 6, kernel.name


def test_a_pattern_of_the_wrong_size_is_refused_by_name() -> None:
    inputs = random_inputs((4, 4))
    with pytest.raises(sparsiattn.InvalidOption, match="17 keys, got 5 rows over 5"):
        finish(Pattern.top(torch.randn(1, 1, 5, 5), 2), inputs)


def test_gather_memory_follows_the_budget() -> None:
    """No N x N tensor is made by planning or by the kernel in tile mode."""

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(tensor, Tensor):
                    self.size = max(self.size, tensor.numel())
            return out

    inputs = random_inputs((64, 64), heads=1, batch=1, tile=(8, 8))
    planner = Connectivity(k=0.05).planner(inputs.site)
    with torch.no_grad(), Largest() as seen:
        pattern = finish(planner(inputs), inputs, background=2)
        Gather()(inputs, pattern)
    assert isinstance(pattern, KeyIndex)
    assert seen.size < 4097 * 4097 / 8
