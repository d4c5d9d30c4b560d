"""Attention of every query to its own best keys in compiled code, against loops by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import sparsiattn
from sparsiattn import AttentionInputs, Site
from sparsiattn.attention import KeyIndex, TopKeys, TopLogits
from sparsiattn.attention.geometry import tile_parts
from sparsiattn.kernels import Gather, Native, Reference
from sparsiattn.kernels.native import lists
from sparsiattn.strategies import TopK, finish
from sparsiattn.testing import tiny_images, tiny_vit

pytestmark = pytest.mark.usefixtures("compiled_native")
Grid = tuple[int, int]


def operands(
    grid: Grid, prefix: int, dim: int, width: int, seed: int, *, whole: bool
) -> AttentionInputs:
    """Operands laid out as a host's; of whole numbers, many logits are equal and all exact."""
    n = grid[0] * grid[1] + prefix
    generator = torch.Generator().manual_seed(seed)
    packed = torch.randn(2, n, 3, 2 * dim + width, generator=generator).transpose(1, 2)
    q, k, v = packed.split((dim, dim, width), dim=-1)
    if whole:
        q, k = (x.round().clamp(-1, 1) for x in (q, k))
    site = Site.of(q, k, v, prefix_tokens=prefix, grid=grid, key_grid=grid)
    return AttentionInputs(q, k, v, 0.25 if whole else dim**-0.5, None, site)


def by_hand(inputs: AttentionInputs, keep: int, g: int | None) -> Tensor:
    """Row by row in double precision: the best keys, of equal ones the first, and cell means."""
    q, k, v = (x.double() for x in (inputs.q, inputs.k, inputs.v))
    out, prefix = torch.empty_like(v), inputs.prefix
    rows, columns = inputs.query_grid
    parts = None if g is None else (min(g, rows), min(g, columns)) if rows > 1 else (1, g * g)
    for b, h, i in ((b, h, i) for b in range(2) for h in range(3) for i in range(q.shape[2])):
        logits = (k[b, h] @ q[b, h, i]) * inputs.scale
        if i < prefix:
            out[b, h, i] = logits.softmax(0) @ v[b, h]
            continue
        patches = sorted(range(prefix, len(logits)), key=lambda j: (-logits[j].item(), j))
        kept = [*range(prefix), *patches[: keep - prefix]]
        weights = [math.exp(logits[j]) for j in kept]
        values = [v[b, h, j] for j in kept]
        for y, x in () if parts is None else torch.cartesian_prod(*map(torch.arange, parts)):
            cell = [
                prefix + r * columns + c
                for r in range(rows)
                for c in range(columns)
                if r * parts[0] // rows == y and c * parts[1] // columns == x
            ]
            if not cell:
                continue
            left = len(set(cell) - set(kept))
            mean = k[b, h, cell].mean(0)
            weights.append(left * math.exp(mean @ q[b, h, i] * inputs.scale))
            values.append(v[b, h, cell].mean(0))
        share = torch.tensor(weights, dtype=torch.double)
        out[b, h, i] = share @ torch.stack(values) / share.sum()
    return out.float()


def finished(inputs: AttentionInputs, k: int | float, g: int | None) -> TopKeys:
    with torch.no_grad():
        pattern = finish(TopLogits.of(inputs, k), inputs, background=g)
    assert isinstance(pattern, TopKeys)
    return pattern


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    grid=st.tuples(st.integers(1, 9), st.integers(2, 9)),
    prefix=st.integers(0, 3),
    dim=st.sampled_from([4, 8, 13, 16, 64, 72, 80]),
    width=st.sampled_from([4, 11, 16, 64, 72]),
    share=st.floats(0.05, 0.95),
    g=st.sampled_from([None, 1, 3, 5]),
    whole=st.booleans(),
    seed=st.integers(0, 99),
)
def test_equals_loops(
    grid: Grid, prefix: int, dim: int, width: int, share: float, g: int | None, whole: bool,
    seed: int,
) -> None:  # fmt: skip
    inputs = operands(grid, prefix, dim, width, seed, whole=whole)
    keep = min(prefix + max(1, round(share * grid[0] * grid[1])), inputs.n_keys - 1)
    pattern = finished(inputs, keep, g)
    assert Native().why_not(inputs, pattern) == []
    found = Native()(inputs, pattern)
    torch.testing.assert_close(found, by_hand(inputs, keep, g), rtol=1e-4, atol=1e-5)
    assert found.transpose(1, 2).is_contiguous()  # the host's reshape copies nothing


@pytest.mark.parametrize("kernel", [Gather(), Reference()], ids=["gather", "reference"])
@pytest.mark.parametrize("g", [None, 5])
def test_kernels_that_need_lists_get_the_same(kernel: sparsiattn.Kernel, g: int | None) -> None:
    inputs = operands((14, 14), 1, 64, 64, 0, whole=False)
    pattern = finished(inputs, 0.1, g)
    torch.testing.assert_close(
        Native()(inputs, pattern), kernel(inputs, pattern), rtol=1e-4, atol=1e-5
    )
    assert pattern.index.shape[-1] == pattern.width == 20
    assert pattern.pairs() == 197 + 196 * (20 + (g or 0) ** 2)


@pytest.mark.parametrize("columns", [64, 250, 1500])
def test_rows_that_are_no_bell(columns: int) -> None:
    """Logits of every shape: alike, two values, one far above, in steps, over many magnitudes."""
    shapes = [
        torch.zeros(columns),
        (torch.arange(columns) % 7 == 0).float(),
        torch.eye(columns)[3] * 50,
        torch.arange(columns) // 9 * 0.5,
        torch.linspace(-1, 1, columns) ** 9 * 30,
        torch.cat([torch.full((columns // 2,), 2.0), torch.linspace(0, 1, columns - columns // 2)]),
    ]
    logits = torch.stack(shapes)
    k = torch.zeros(1, 1, columns, 8)
    k[0, 0, :, : len(shapes)] = logits.T
    q = torch.eye(8)[: len(shapes)].expand(1, 1, -1, -1).contiguous()
    v = torch.randn(1, 1, columns, 8)
    for keep in (1, 5, columns // 4, columns - 1):
        found = torch.ops.sparsiattn.native_attend_to_best(q, k, v, None, 0, keep, 0, 0, 1.0)
        for row, scores in enumerate(logits):
            kept = scores.sort(descending=True, stable=True).indices[:keep]
            expected = scores[kept].double().softmax(0) @ v[0, 0, kept].double()
            torch.testing.assert_close(found[0, 0, row], expected.float(), rtol=1e-4, atol=1e-5)


def test_numbers_that_are_none_reach_their_rows_only() -> None:
    inputs = operands((8, 8), 1, 16, 16, 0, whole=False)
    q = inputs.q.clone()
    q[0, 1, 5], q[1, 2, 7, 3] = float("nan"), float("inf")
    broken = inputs.replace(q=q)
    out = Native()(broken, finished(broken, 0.2, 2))
    assert out[0, 1, 5].isnan().all()
    assert out[1, 2, 7].isnan().all()
    assert out.isnan().sum() == 2 * out.shape[-1]


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_share_the_rows_of_few_heads(threads: int) -> None:
    before = torch.get_num_threads()
    inputs = operands((20, 20), 1, 32, 32, 0, whole=False)
    one = inputs.replace(q=inputs.q[:1, :1], k=inputs.k[:1, :1], v=inputs.v[:1, :1])
    try:
        torch.set_num_threads(threads)
        found = Native()(one, finished(one, 0.1, 4))
    finally:
        torch.set_num_threads(before)
    expected = Reference()(one, finished(one, 0.1, 4))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"scale": -0.1}, "scale"),
        ({"dropout": 0.5}, "dropout"),
    ],
    ids=["scale", "dropout"],
)
def test_other_calls_have_lists_made_for_them(change: dict[str, object], reason: str) -> None:
    inputs = operands((8, 8), 1, 16, 16, 0, whole=False).replace(**change)
    with torch.no_grad():
        pattern = finish(TopLogits.of(inputs, 0.2), inputs)
    assert not isinstance(pattern, TopKeys), reason


def test_a_pass_with_gradients_has_lists_made_for_it() -> None:
    model, images = tiny_vit(), tiny_images(2)
    expected = sparsiattn.patch(model, TopK(0.3), kernel="reference")
    model(images).sum().backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    expected.unpatch()
    model.zero_grad()
    with sparsiattn.patch(model, TopK(0.3)):
        model(images).sum().backward()
    for found, exact in zip((p.grad for p in model.parameters()), gradients, strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-3, atol=1e-5)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    grid=st.tuples(st.integers(1, 13), st.integers(2, 13)),
    tile=st.sampled_from([(2, 2), (4, 4), (8, 8), (3, 5)]),
    prefix=st.integers(0, 2),
    dim=st.sampled_from([8, 13, 64]),
    seed=st.integers(0, 99),
)
def test_tiles_keep_the_keys_that_their_squares_of_queries_vote_for(
    grid: Grid, tile: Grid, prefix: int, dim: int, seed: int
) -> None:
    inputs = operands(grid, prefix, dim, 8, seed, whole=False).replace(tile=tile)
    rows, columns = grid
    keep = prefix + max(1, rows * columns // 3)
    with torch.no_grad():
        pattern = finish(TopLogits.of(inputs, keep), inputs)
    assert isinstance(pattern, KeyIndex)
    places = [(r, c) for r in range(rows) for c in range(columns)]
    parts = tile_parts(grid, tile)
    in_row = rows == 1  # a row of tokens is cut into runs
    sides = (1, -(-tile[0] * tile[1] // 4)) if in_row else (-(-tile[0] // 2), -(-tile[1] // 2))
    cuts = [max(1, min(side, n // p)) for side, n, p in zip(sides, grid, parts, strict=True)]

    def cell(place: tuple[int, int], factors: list[int]) -> tuple[int, int]:
        y, x = (a * p * f // n for a, p, f, n in zip(place, parts, factors, grid, strict=True))
        return y, x

    q, k = inputs.q.double(), inputs.k.double()
    for number, one in enumerate((y, x) for y in range(parts[0]) for x in range(parts[1])):
        mine = [i for i, place in enumerate(places) if cell(place, [1, 1]) == one]
        squares = {cell(places[i], cuts) for i in mine}
        votes = []
        for square in squares:
            tokens = [prefix + i for i in mine if cell(places[i], cuts) == square]
            mean = q[:, :, tokens].mean(2, keepdim=True)
            votes.append((mean @ k.mT * inputs.scale).softmax(-1).squeeze(2))
        best = torch.stack(votes).amax(0)[..., prefix:]
        expected = best.topk(keep - prefix, dim=-1).values.sum(-1)
        kept = pattern.index[:, :, number]
        assert (kept[..., :prefix] == torch.arange(prefix)).all()
        found = best.gather(-1, kept[..., prefix:] - prefix)
        assert all(len(set(row.tolist())) == keep for row in kept.flatten(0, 1))
        torch.testing.assert_close(found.sum(-1), expected, rtol=1e-5, atol=1e-7)


def test_votes_without_compiled_code_are_the_same() -> None:
    inputs = operands((20, 20), 1, 16, 16, 3, whole=False).replace(tile=(8, 8))
    pattern = TopLogits.of(inputs, 0.1)
    with torch.no_grad():
        compiled = finish(pattern, inputs)
        plain = finish(pattern.ranked(), inputs)
    assert isinstance(compiled, KeyIndex)
    assert isinstance(plain, KeyIndex)
    assert torch.equal(compiled.index.sort(-1).values, plain.index.sort(-1).values)


@pytest.mark.parametrize("grid", [(7, 9), (20, 20), (36, 37)])
@pytest.mark.parametrize("biased", [False, True])
def test_voters_whose_keys_leave_the_cache_choose_the_same(
    monkeypatch: pytest.MonkeyPatch, grid: Grid, biased: bool
) -> None:
    """Scores of several groups of voters are computed panel by panel there."""
    inputs = operands(grid, 2, 16, 16, 3, whole=False).replace(tile=(4, 4))
    if biased:
        inputs = inputs.replace(bias=torch.randn(1, 1, inputs.n_queries, inputs.n_keys))
    found = []
    for cached in (1 << 40, 0):
        monkeypatch.setattr(lists, "CACHED", cached)
        with torch.no_grad():
            pattern = finish(TopLogits.of(inputs, 0.2), inputs)
        assert isinstance(pattern, KeyIndex)
        found.append(pattern.index)
    assert torch.equal(*found)
