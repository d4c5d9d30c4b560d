"""Merged tokens by compiled code, and attention to them: equal to plain loops and to torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

import sparsiattn
from sparsiattn.attention.site import Site
from sparsiattn.attention.token_state import TokenState
from sparsiattn.kernels.native import biased, build, merge
from sparsiattn.patching.flop_counter import flop_counter
from sparsiattn.strategies import TokenMerge
from sparsiattn.strategies.token_base import TokenInputs
from tests.support import zoo

pytestmark = pytest.mark.usefixtures("compiled_native")


def by_loops(
    k: Tensor, x: Tensor, size: Tensor | None, merged: int, prefix: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One image, token by token (ToMe, section 3.1); equal cosines go to the first."""
    keys, n = k.double().mean(0)[prefix:], len(x)
    even = [i for i in range(n) if (i + prefix) % 2 == 0]
    odd = [i for i in range(n) if (i + prefix) % 2]
    lengths = keys.norm(dim=-1)
    table = (keys[even] @ keys[odd].mT / (lengths[even, None] * lengths[odd])).tolist()
    edges = []
    for i, cosines in zip(even, table, strict=True):
        best = cosines.index(max(cosines))
        edges.append((cosines[best], i, odd[best]))
    edges.sort(key=lambda edge: -edge[0])  # stable
    target = {i: j for _, i, j in edges[:merged]}
    index = [i for i in even if i not in target] + odd
    assign = torch.tensor([index.index(target.get(i, i)) for i in range(n)])
    weight = torch.ones(n, dtype=torch.double) if size is None else size.double()
    sizes = torch.zeros(len(index), dtype=torch.double).index_add(0, assign, weight)
    total = torch.zeros(len(index), x.shape[1], dtype=torch.double)
    means = total.index_add(0, assign, x.double() * weight[:, None]) / sizes[:, None]
    return means.float(), torch.tensor(index), assign, sizes.float()


def check(k: Tensor, x: Tensor, size: Tensor | None, merged: int, prefix: int, ahead: int) -> None:
    whole = F.pad(x, (0, 0, ahead, 0), value=3.0)
    before = x.clone()
    out, index, assign, sizes, logs = merge.merged(k, whole[:, ahead:], size, merged, prefix, ahead)
    assert torch.equal(out[:, :ahead], whole[:, :ahead])
    for i in range(len(x)):
        own = None if size is None else size[i]
        expected = by_loops(k[i], x[i], own, merged, prefix)
        torch.testing.assert_close(out[i, ahead:], expected[0], rtol=1e-5, atol=1e-5)
        for got, wanted in zip((index[i], assign[i], sizes[i]), expected[1:], strict=True):
            assert torch.equal(got, wanted)
    torch.testing.assert_close(logs[:, 0, 0], F.pad(sizes.log(), (ahead, 0)))
    assert torch.equal(whole[:, ahead:], before)


def exact_keys(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Keys whose cosines are exact: entries 1 and -1, of four, sixteen or sixty-four channels."""
    return torch.randint(0, 2, shape, generator=generator).float() * 2 - 1


@given(
    batch=st.integers(0, 3),
    heads=st.sampled_from([1, 3]),
    tokens=st.integers(2, 150),
    dim=st.sampled_from([4, 16, 64]),
    prefix=st.integers(0, 5),
    ahead=st.integers(0, 3),
    sized=st.booleans(),
    share=st.floats(0, 1),
    seed=st.integers(0, 1000),
)
@settings(max_examples=30, deadline=None)
def test_every_edge_is_that_of_plain_loops(
    batch: int, heads: int, tokens: int, dim: int, prefix: int, ahead: int, sized: bool,
    share: float, seed: int,
) -> None:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    one = exact_keys((batch, 1, prefix + tokens, dim), generator)
    k = one.expand(-1, heads, -1, -1)  # the mean of heads alike is exact, too
    x = torch.randn(batch, tokens, 10, generator=generator)
    size = torch.randint(1, 9, (batch, tokens), generator=generator).float() if sized else None
    check(k, x, size, max(1, int(share * (tokens // 2))), prefix, ahead)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("batch", "tokens", "dim"), [(1, 196, 64), (9, 65, 72), (2, 301, 8)])
def test_keys_of_any_strides(batch: int, tokens: int, dim: int, threads: int) -> None:
    generator = torch.Generator().manual_seed(1)
    qkv = torch.randn(batch, 1 + tokens, 3, 6, dim, generator=generator)
    k = qkv.permute(2, 0, 3, 1, 4)[1]
    x = torch.randn(batch, tokens, 33, generator=generator)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check(k, x, None, tokens // 5, 1, 1)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("sized", [False, True])
def test_as_the_path_of_torch(sized: bool) -> None:
    model = zoo.build("vit")
    x = zoo.images(model)
    with sparsiattn.patch(model, "token_merge", r=6) as live:
        with torch.no_grad():
            fast, source = model(x), live.source()
        slow = model(x)  # with gradients, by torch's own operations
        assert slow.requires_grad
        assert torch.equal(live.source(), source)
    torch.testing.assert_close(fast, slow.detach())


def test_keys_that_are_no_numbers_merge_some_tokens_and_all_places_stay_valid() -> None:
    k, x = torch.full((1, 2, 40, 8), float("nan")), torch.randn(1, 40, 4)
    _, index, assign, sizes, _ = merge.merged(k, x, None, 20, 0, 0)
    assert sorted(index[0].tolist()) == list(range(1, 40, 2))
    assert int(assign.min()) >= 0
    assert int(assign.max()) < 20
    assert float(sizes.sum()) == 40


def test_other_operands_keep_the_path_of_torch() -> None:
    k, x = torch.randn(1, 2, 9, 8), torch.randn(1, 8, 4)
    assert merge.merges(k, x, None)
    assert not merge.merges(k.double(), x, None)
    assert not merge.merges(k, x.bfloat16(), None)
    assert not merge.merges(k, x.mT.contiguous().mT, None)
    assert not merge.merges(k.requires_grad_(), x, None)


def test_a_strategy_that_is_called_by_itself_knows_no_prefix_rows() -> None:
    q = torch.randn(1, 2, 21, 8)
    site = Site.of(q, q, q, prefix_tokens=1)
    inputs = sparsiattn.AttentionInputs(q, q, q, 1.0, None, site)
    x = torch.randn(1, 20, 4)
    reduction = TokenMerge(r=3).reduce(TokenInputs(x, site, inputs, 0, 1))
    assert reduction is not None
    state, merged = reduction.apply(TokenState(1, 0, (4, 5)), x)
    assert merged.shape == (1, 17, 4)
    assert state.ids is not None
    assert state.log_size(torch.float32).shape == (1, 1, 1, 17)  # type: ignore[union-attr]


@given(
    batch=st.integers(1, 3),
    tokens=st.integers(1, 200),
    dims=st.sampled_from([(64, 64), (8, 9), (72, 72), (256, 80)]),
    hidden=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(max_examples=20, deadline=None)
def test_attention_with_a_logit_for_every_key(
    batch: int, tokens: int, dims: tuple[int, int], hidden: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(batch, tokens, 2, d, generator=generator).transpose(1, 2)
        for d in (dims[0], dims[0], dims[1])
    )
    bias = torch.randn(batch, tokens, generator=generator)
    if hidden:
        bias[:, 1::3] = float("-inf")
    logits = 0.2 * q.double() @ k.double().mT + bias[:, None, None].double()
    expected = (logits.softmax(-1) @ v.double()).float()
    out = biased.key_biased(q, k, v, bias, 0.2)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    assert out.transpose(1, 2).is_contiguous()  # so that the host's reshape copies nothing


OPERATORS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "merged": (
        torch.ops.sparsiattn.native_merged.default,
        (torch.randn(2, 3, 21, 8), torch.randn(2, 20, 5), torch.ones(2, 20), 4, 1, 0),
    ),
    "key_biased": (
        torch.ops.sparsiattn.native_key_biased.default,
        (*(torch.randn(2, 3, 9, 8) for _ in range(3)), torch.zeros(2, 9), 0.5),
    ),
}


@pytest.mark.parametrize("which", OPERATORS)
def test_operators_say_their_shapes_without_running(which: str) -> None:
    operator, operands = OPERATORS[which]
    torch.library.opcheck(operator, operands, test_utils=("test_schema", "test_faketensor"))


def test_macs_are_those_of_the_path_of_torch() -> None:
    """What a report counts does not depend on who computes it."""
    model = zoo.build("vit")
    x = zoo.images(model)
    with sparsiattn.patch(model, "token_merge", r=6), torch.no_grad():
        counted = []
        for path in (True, False):
            with pytest.MonkeyPatch.context() as patched:
                if not path:
                    patched.setattr(merge, "merges", lambda *_: False)
                    patched.setattr(biased, "serves_call", lambda *_: False)
                with flop_counter() as counter:
                    model(x)
            counted.append(counter.get_total_flops())
    assert counted[0] == counted[1]


@pytest.mark.parametrize(
    ("strategy", "dtype", "compiles"),
    [
        ("token_merge", torch.float32, True),
        ("token_merge", torch.float64, False),
        ("token_drop", torch.float32, False),
    ],
)
def test_warmup_compiles_what_merges(
    strategy: str, dtype: torch.dtype, compiles: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(build, "compile_here", lambda: asked.append(True))
    model = zoo.build("vit").to(dtype)
    with sparsiattn.patch(model, strategy) as live:
        assert not asked  # patching compiles nothing
        live.warmup(zoo.images(model).to(dtype))
    assert bool(asked) == compiles
