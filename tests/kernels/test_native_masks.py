"""The compiled kernel under the masks and biases of hosts and in half precision."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from sparsiattn import Pattern
from sparsiattn.attention import CountedSummary, KeyIndex, KeyLists, Summary, TopKeys, TopLogits
from sparsiattn.kernels import Native, Reference
from sparsiattn.strategies import finish
from tests.support.host_masks import HALVES, KINDS, Case, tolerances

pytestmark = pytest.mark.usefixtures("compiled_native")

SETTINGS = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
CASES = st.builds(
    Case,
    grid=st.tuples(st.integers(1, 9), st.integers(2, 9)),
    prefix=st.integers(0, 3) | st.sampled_from([9, 70]),  # many of them go in parts
    dims=st.tuples(st.sampled_from([4, 13, 16, 72, 80]), st.sampled_from([4, 11, 16, 64, 72])),
    kind=st.sampled_from(KINDS),
    lead=st.tuples(st.sampled_from([1, 2]), st.sampled_from([1, 3])),
    dtype=st.sampled_from([torch.float32, *HALVES]),
    seed=st.integers(0, 999),
).map(lambda case: case.as_sam() if case.seed % 4 else case)


@SETTINGS
@given(case=CASES, share=st.floats(0.02, 0.98), background=st.sampled_from([None, 1, 3, 5]))
def test_best_keys_of_every_query(case: Case, share: float, background: int | None) -> None:
    inputs = case.inputs()
    keep = min(case.prefix + max(1, round(share * inputs.n_keys)), inputs.n_keys - 1)
    with torch.no_grad():
        pattern = finish(TopLogits.of(inputs, keep), inputs, background=background)
    assert isinstance(pattern, TopKeys)
    assert Native().why_not(inputs, pattern) == []
    found = Native()(inputs, pattern)
    assert found.dtype == case.dtype
    torch.testing.assert_close(found, Reference()(inputs, pattern), **tolerances(case.dtype))
    assert found.transpose(1, 2).is_contiguous()  # the host's reshape copies nothing


def test_a_key_that_is_hidden_may_be_no_number() -> None:
    inputs = Case((8, 8), 1, (16, 16), "padding", (2, 1), torch.float32, 0).inputs()
    bias = inputs.bias
    assert bias is not None
    hidden = ~bias[:, 0, 0]
    with torch.no_grad():
        pattern = finish(TopLogits.of(inputs, 0.1), inputs, background=3)
        k = inputs.k.masked_fill(hidden[:, None, :, None], float("nan"))
        broken = inputs.replace(k=k)
        found = Native()(broken, finish(TopLogits.of(broken, 0.1), broken, background=3))
    torch.testing.assert_close(found[..., 1:, :], Native()(inputs, pattern)[..., 1:, :])


@pytest.mark.parametrize("dtype", HALVES)
def test_numbers_are_rounded_as_torch_does(dtype: torch.dtype) -> None:
    """A value that one query passes on alone: every number that the type has, and some between."""
    codes = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    finite = codes[codes.isfinite() & (codes.abs().double() < 1e38)]  # sums must be finite
    v = finite[: finite.numel() // 64 * 64].view(1, 1, -1, 64)
    n = v.shape[-2]
    q = torch.ones(1, 1, n, 4, dtype=dtype)
    here = torch.eye(n, dtype=torch.bool)[None, None]
    found = torch.ops.sparsiattn.native_attend_to_best(
        q, torch.zeros_like(q), v, None, 0, 1, 0, 0, 1.0, here
    )
    torch.testing.assert_close(found, v, rtol=0, atol=0)
    half = here | here.roll(1, -1)  # the mean of two
    found = torch.ops.sparsiattn.native_attend_to_best(
        q, torch.zeros_like(q), v, None, 0, 2, 0, 0, 1.0, half
    )
    expected = (0.5 * v.float() + 0.5 * v.roll(-1, -2).float()).to(dtype)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@SETTINGS
@given(
    case=CASES,
    tile=st.sampled_from([(1, 2), (2, 2), (4, 4), (5, 3), (8, 8), (9, 9)]),
    block=st.sampled_from([1, (2, 2), (4, 3)]),
    k=st.floats(0.05, 0.95),
    background=st.sampled_from([None, 1, 3]),
)
def test_lists_of_tiles(
    case: Case, tile: object, block: object, k: float, background: int | None
) -> None:
    inputs = case.inputs(tile=tile, block=block)
    scores = torch.rand(2, 3, inputs.n_keys, inputs.n_keys)
    pattern = finish(Pattern.top(scores, k), inputs, background=background)
    assume(isinstance(pattern, KeyLists))
    summary = pattern.summary
    if summary is not None and summary.per_query:
        assert Native().why_not(inputs, pattern) == [
            "the model's mask makes summary keys differ between queries"
        ]
        pattern = replace(pattern, summary=None)  # type: ignore[type-var]
    assert Native().why_not(inputs, pattern) == []
    found = Native()(inputs, pattern)
    torch.testing.assert_close(found, Reference()(inputs, pattern), **tolerances(case.dtype))
    if summary is not None and not summary.per_query:
        assert isinstance(summary, CountedSummary)
        again = replace(
            pattern, summary=Summary(summary.cells, summary.parts, summary.bias, summary.allowed)
        )  # type: ignore[type-var]
        torch.testing.assert_close(Native()(inputs, again), found, **tolerances(case.dtype))


@SETTINGS
@given(case=CASES, share=st.floats(0.02, 0.98), tile=st.sampled_from([(2, 2), (4, 4), (5, 3)]))
def test_votes(case: Case, share: float, tile: tuple[int, int]) -> None:
    """Keys of a tile are those that torch finds; where two votes are close, either will do."""
    inputs = case.inputs(tile=tile)
    keep = min(case.prefix + max(1, round(share * inputs.n_keys)), inputs.n_keys - 1)
    assume(keep > case.prefix)
    wish = TopLogits.of(inputs, keep)
    with torch.no_grad():
        found = finish(wish, inputs)
        votes = replace(
            wish, inputs=inputs.replace(q=inputs.q.float(), k=inputs.k.float())
        ).ranked()
    assert isinstance(found, KeyIndex)
    scores = votes.scores
    if scores.shape[-2] == inputs.n_queries:  # each of them may see other keys
        assert not wish.votes
        return
    assert inputs.tiles is not None
    assert scores.shape[-2] == inputs.tiles.count == found.index.shape[-2]
    allowed = inputs.allowed()
    if allowed is not None:
        scores = scores.masked_fill(~allowed, 0.0)
    scores = scores[..., case.prefix :]
    patches = found.index[..., case.prefix :] - case.prefix
    assert (found.index[..., : case.prefix] == torch.arange(case.prefix)).all()
    kept = scores.gather(-1, patches).sort(-1).values
    best = scores.topk(keep - case.prefix).values.sort(-1).values
    torch.testing.assert_close(kept, best, rtol=1e-4, atol=1e-7)
    assert (patches.sort(-1).values.diff() > 0).all()
