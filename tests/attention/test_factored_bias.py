"""A bias kept as its factors is, to any operation of torch, the tensor that it stands for."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from sparsiattn.attention.factored_bias import FactoredBias, are_factors, sum_of
from sparsiattn.errors import ModelChanged

Step = Callable[[Tensor], Tensor]


def pair(lead: tuple[int, ...] = (2, 3), sides: tuple[int, int] = (4, 5)) -> tuple[Tensor, Tensor]:
    """A sum of a host, ``[b * h, qh, qw, kh, kw]``, put off and computed."""
    generator = torch.Generator().manual_seed(0)
    many = (lead[0] * lead[1], *sides)
    rows = torch.randn(*many, sides[0], 1, generator=generator)
    columns = torch.randn(*many, 1, sides[1], generator=generator)
    return sum_of(columns, rows), rows + columns


MERGED: dict[str, Step] = {
    "reshape": lambda x: x.reshape(-1, 20, 20),
    "view": lambda x: x.view(2, 3, 20, 20),
    "flatten": lambda x: x.flatten(1, 2).flatten(-2),
}
STEPS: dict[str, Step] = {
    "first row": lambda x: x[..., 0, :],
    "rows": lambda x: x[..., 3:7, :],
    "some rows": lambda x: x.index_select(-2, torch.tensor([x.shape[-2] - 1, 0, 0])),
    "rows by list": lambda x: x[..., [0, -1], :],
    "an image": lambda x: x[:1],
    "one more axis": lambda x: x[None],
    "same type": lambda x: x.float().contiguous().detach().to(torch.float32),
    "other type": lambda x: x.to(torch.float64),
    "as large": lambda x: x.expand(x.shape),
    "one axis": lambda x: x.reshape(-1, x.shape[-1]),
    "keys": lambda x: x[..., 2:9],
    "keys exchanged": lambda x: x.flip(-1),
    "transposed": lambda x: x.mT,
    "scaled": lambda x: x * 2,
    "softmax": lambda x: x.softmax(-1),
    "mean": lambda x: x.mean(-2, keepdim=True),
    "comparison": lambda x: (x > 0).float(),
    "joined": lambda x: torch.cat([x, x]),
    "listed": lambda x: x.gather(-1, torch.full_like(x, x.shape[-1] // 2).long()[..., :1]),
}
LAZY = {
    *("first row", "rows", "some rows", "an image", "one more axis", "same type", "as large"),
    "one axis",
}


@settings(max_examples=60, deadline=None)
@given(
    merged=st.sampled_from(sorted(MERGED)),
    steps=st.lists(st.sampled_from(sorted(STEPS)), max_size=3),
    inference=st.booleans(),
)
def test_every_operation_sees_the_sum(merged: str, steps: list[str], inference: bool) -> None:
    with torch.inference_mode(inference):
        found, exact = (MERGED[merged](x) for x in pair())
        for step in steps:
            if exact.dim() < 2 or not exact.numel():
                break
            found, exact = STEPS[step](found), STEPS[step](exact)
            assert found.shape == exact.shape
            assert found.dtype == exact.dtype
        torch.testing.assert_close(found + 0, exact + 0, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("step", sorted(LAZY))
def test_what_leaves_keys_whole_builds_nothing(
    step: str, inference: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FactoredBias, "built", lambda self: pytest.fail("it was built"))
    with torch.inference_mode(inference):
        bias = MERGED["view"](pair()[0])
        assert isinstance(STEPS[step](bias), FactoredBias)


def test_attention_takes_it() -> None:
    found, exact = (MERGED["view"](x) for x in pair())
    q, k, v = torch.randn(3, 2, 3, 20, 8).unbind(0)
    with torch.no_grad():
        torch.testing.assert_close(
            F.scaled_dot_product_attention(q, k, v, found),
            F.scaled_dot_product_attention(q, k, v, exact),
        )


def test_who_holds_a_view_sees_what_is_written() -> None:
    base, exact = pair()
    view, same = MERGED["view"](base), base.view(2, 3, 4, 5, 20)
    view += 1
    view.masked_fill_(torch.arange(20) < 3, -7.0)
    torch.add(view, 0.5, out=view)
    expected = ((exact + 1).flatten(-2).masked_fill(torch.arange(20) < 3, -7.0) + 0.5).flatten()
    for x in (view, same, base):
        torch.testing.assert_close(x.reshape(-1) + 0, expected)


@pytest.mark.parametrize("first", ["part", "whole"])
def test_parts_and_writing_are_refused_together(first: str) -> None:
    bias = MERGED["view"](pair()[0])
    part = bias[:, :1]
    with pytest.raises(ModelChanged, match="writes to a slice"):
        (part if first == "part" else bias).mul_(2)


@pytest.mark.parametrize(
    "shapes",
    [
        ((9, 8, 8, 1), (9, 8, 8, 1)),
        ((9, 8, 8, 16), (9, 8, 1, 16)),
        ((2, 200, 1), (2, 1, 200)),
        ((1, 2, 8, 1), (1, 2, 1, 8)),
        ((9, 8, 64, 1), (1, 8, 1, 64)),
    ],
    ids=["same", "full", "no queries", "few", "broadcast"],
)
def test_other_sums_are_none_of_it(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    a, b = (torch.zeros(shape) for shape in shapes)
    assert not are_factors(a, b)
    assert not are_factors(b, a)
    assert are_factors(torch.zeros(9, 8, 64, 1), torch.zeros(9, 8, 1, 64))
