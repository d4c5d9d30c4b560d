"""Hand-written attention reaches the patch whatever its spelling, and nothing else changes."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import sparsiattn
from sparsiattn.attention import HostCall
from sparsiattn.errors import ModelChanged
from sparsiattn.runtime.lifting import Lift, Tally
from sparsiattn.runtime.sdpa_intercept import intercepted, pop, push

B, H, N, D = 4, 2, 15, 8


def _fixed(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


BIAS, MASK, FACTOR = _fixed(H, N, N), _fixed(2, N, N), _fixed(H, 1, 1).exp()
ROWS, COLUMNS = _fixed(B, H, 3, 5, 3, 1), _fixed(B, H, 3, 5, 1, 5)
FORBIDDEN = _fixed(N, N) > 1


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1) * 0.3).softmax(-1) @ v


def modules(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return nn.Dropout(0.5).eval()(nn.Softmax(-1)(torch.matmul(q, k.mT) / 3.0 + BIAS)).matmul(v)


def cosine_in_windows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)) * FACTOR
    scores = (scores + BIAS.unsqueeze(0)).view(B // 2, 2, H, N, N)
    scores = (scores + MASK.unsqueeze(1).unsqueeze(0)).view(-1, H, N, N)
    return F.softmax(scores, dim=-1) @ v


def in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q.matmul(k.transpose(-2, -1))
    scores *= 0.3
    scores.add_(BIAS)
    scores.view(2, 2, H, N, N).add_(MASK.unsqueeze(1).unsqueeze(0))  # seen through the view
    return F.dropout(F.softmax(scores, -1), p=0.0).matmul(v)


def columns(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q.mT.transpose(-2, -1) @ k.mT * 0.2 + BIAS
    return (v.mT @ scores.softmax(dim=-1).transpose(-2, -1)).view(B, -1, N).view(B, H, D, N).mT


def scaled_after(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.matmul(((q @ k.mT + BIAS) * 0.5).softmax(-1), v)


def einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("bhlk, bhtk -> bhlt", [q, k]) * 0.3
    return torch.einsum("bhlt,bhtv->bhlv", F.softmax(scores, dim=-1), v)


def rotary(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    angles = torch.einsum("i,j->ij", torch.arange(N) / N, torch.ones(D))  # no attention
    return ((q * angles.cos()) @ (k * angles.sin()).mT).softmax(-1) @ v


def folded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    return torch.bmm(torch.bmm(q, k.mT).mul(0.3).softmax(2), v).view(B, H, N, D)


def decomposed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT * 0.3
    part = scores[:, :, 0:, 0:].view(B, -1, 3, 5, 3, 5) + ROWS + COLUMNS
    scores[:, :, 0:, 0:] = part.view(B, -1, N, N)
    return scores.softmax(-1) @ v


def decomposed_in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT * 0.3
    scores[:, :, 3:, 5:].view(B, -1, 2, 6, 2, 5).add_(
        ROWS[:, :, :2, :1, :2] + COLUMNS[:, :, :1, :1]
    )
    return scores.softmax(-1) @ v


def decomposed_onto_itself(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT * 0.3
    scores[:, :, 1:, 2:] += BIAS[:, 1:, 2:]  # a part, added to in place, and put back
    return scores.softmax(-1) @ v


def decomposed_twice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT * 0.3
    part = scores[:, :, 3:, 5:]
    part += BIAS[:, 3:, 5:]
    part.view(B, -1, 2, 6, 2, 5).add_(ROWS[:, :, :2, :1, :2])
    scores[:, :, 3:, 5:] = part + BIAS[:, :12, :10]
    return scores.softmax(-1) @ v


def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q @ k.mT).masked_fill(FORBIDDEN, float("-inf")).float()
    return scores.softmax(-1, dtype=torch.float32).to(v.dtype) @ v


def fewer_keys(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k[..., :7, :].mT * 0.3).squeeze(0).softmax(-1) @ v[..., :7, :]


SPELLINGS = (
    plain, modules, cosine_in_windows, in_place, columns, scaled_after, einsum, rotary, folded,
    decomposed, decomposed_in_place, decomposed_onto_itself, decomposed_twice, masked, fewer_keys,
)  # fmt: skip


def talking_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mixed = (q @ k.mT).permute(0, 2, 3, 1) @ torch.eye(H)
    return mixed.permute(0, 3, 1, 2).softmax(-1) @ v


def negated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (-(q @ k.mT)).softmax(-1) @ v


def over_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-2) @ v


def gated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.mT).softmax(-1)
    return (weights * 0.5 + BIAS.softmax(-1) * 0.5) @ v


def per_key_factor(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.mT) * BIAS).softmax(-1) @ v


def finite_fill(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).masked_fill(FORBIDDEN, 0.5).softmax(-1) @ v


def changed_behind(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    scores.clamp_(-0.5, 0.5)
    return scores.softmax(-1) @ v


def no_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT) @ v


OTHERS = (
    talking_heads, negated, over_queries, gated, per_key_factor, finite_fill, changed_behind,
    no_softmax,
)  # fmt: skip


def operands() -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = torch.randn(3, B, H, N, D).unbind(0)
    return q, k, v


def lifted(form: Callable[..., Tensor], *given: Tensor) -> tuple[Tensor, int]:
    tally = Tally()
    with Lift(tally):
        found = form(*given)
    return torch.as_tensor(found) if isinstance(found, Tensor) else found.tensor(), tally.attended


@pytest.mark.parametrize("form", SPELLINGS, ids=lambda form: form.__name__)
def test_every_spelling_is_one_call(form: Callable[..., Tensor]) -> None:
    given = operands()
    found, calls = lifted(form, *given)
    assert calls == 1
    torch.testing.assert_close(found, form(*given), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", SPELLINGS, ids=lambda form: form.__name__)
def test_gradients_are_the_same(form: Callable[..., Tensor]) -> None:
    given = [x.requires_grad_() for x in operands()]
    weight = torch.randn(B, H, N, D)
    expected = torch.autograd.grad((form(*given) * weight).sum(), given)
    found = torch.autograd.grad((lifted(form, *given)[0] * weight).sum(), given)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", OTHERS, ids=lambda form: form.__name__)
def test_anything_else_is_computed_as_written(form: Callable[..., Tensor]) -> None:
    given = operands()
    found, calls = lifted(form, *given)
    assert calls == 0
    torch.testing.assert_close(found, form(*given), rtol=1e-6, atol=1e-6)


STEPS: dict[str, Callable[[Any], Any]] = {
    "half": lambda s: s * 0.5,
    "factor": lambda s: FACTOR * s,
    "third": lambda s: s / 3,
    "bias": lambda s: s + BIAS,
    "bias first": lambda s: BIAS + s,
    "minus": lambda s: s - BIAS,
    "reversed minus": lambda s: 1 - s,
    "in place": lambda s: s.add_(BIAS),
    "mask": lambda s: s.masked_fill(FORBIDDEN, -1e9),
    "split": lambda s: (s.view(2, B // 2, H, N, N) + MASK[0]).view(B, H, N, N),
    "rows": lambda s: s + BIAS[:, :, :1],
    "number": lambda s: s + 1.0,
    "power": lambda s: (s**2).clamp(max=4.0),  # or rounding grows with every further power
    "exp": lambda s: s.exp().clamp(max=2.0),
    "flip": lambda s: s.transpose(-2, -1),
    "double": lambda s: s + s,
    "shape": lambda s: s * (1.0 / s.shape[-1]) + s.size(-2) * 0.01 * s.dim(),
}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(sorted(STEPS)), max_size=6), st.integers(0, 100))
def test_whatever_is_done_to_scores_is_done_right(steps: list[str], seed: int) -> None:
    torch.manual_seed(seed)
    given = operands()

    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.mT * 0.3
        for step in steps:
            scores = STEPS[step](scores)
        return scores.softmax(-1) @ v

    expected = program(*given)
    torch.testing.assert_close(lifted(program, *given)[0], expected, rtol=1e-4, atol=1e-4)


class Attention(nn.Module):
    """Self-attention of 16 tokens, in any of the spellings above."""

    def __init__(self, form: Callable[..., Tensor], heads: int = H) -> None:
        super().__init__()
        self.form, self.num_heads = form, heads
        self.qkv = nn.Linear(heads * D, 3 * heads * D)

    def forward(self, x: Tensor, weights: bool = False) -> Any:
        b, n, c = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.num_heads, D).permute(2, 0, 3, 1, 4).unbind(0)
        out = self.form(q, k, v).transpose(1, 2).reshape(b, n, c)
        return (out, (q @ k.mT).softmax(-1)) if weights else out


class Model(nn.Module):
    def __init__(self, form: Callable[..., Tensor] = plain) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Attention(form), Attention(form)])

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).mT
        for block in self.blocks:
            tokens = tokens + block(tokens)
        return tokens


def images(batch: int = B) -> Tensor:
    return torch.randn(batch, H * D, 4, 4)


def patched(model: nn.Module, k: float = 0.25, **options: Any) -> sparsiattn.Patch:
    return sparsiattn.patch(model, "topk", k=k, input=(1, H * D, 4, 4), **options)


class Watch(TorchDispatchMode):
    """Notes the shape of every matrix product."""

    def __init__(self, shapes: list[torch.Size]) -> None:
        super().__init__()
        self.shapes = shapes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if "mm" in str(func) and isinstance(out, Tensor):
            self.shapes.append(out.shape)
        return out


class TestPatched:
    def test_identity_change_and_undo(self) -> None:
        model, x = Model(), images()
        kinds, dense = [type(block) for block in model.blocks], model(x)
        with patched(model, k=1.0) as live:
            assert [site.name for site in live.sites] == ["blocks.0", "blocks.1"]
            torch.testing.assert_close(model(x), dense, rtol=1e-5, atol=1e-5)
        with patched(model) as live:
            assert not torch.allclose(model(x), dense)
            with live.disabled():
                assert torch.equal(model(x), dense)
        assert [type(block) for block in model.blocks] == kinds
        assert torch.equal(model(x), dense)

    def test_scores_that_were_not_kept_are_not_computed(self) -> None:
        """The product of all queries with all keys never happens."""
        model, x = Model(), images()
        shapes: list[torch.Size] = []
        with patched(model, k=0.25, kernel="gather"), torch.no_grad(), Watch(shapes):
            model(x)
        # `topk` itself plans by all scores, once a site
        assert sum(shape[-2:] == (16, 16) for shape in shapes) == len(model.blocks)

    def test_copies_and_pickles(self) -> None:
        model, x = Model(), images()
        with patched(model):
            sparse, stored = model(x), io.BytesIO()
            assert torch.equal(copy.deepcopy(model)(x), sparse)
            torch.save(model, stored)
            stored.seek(0)
            again = torch.load(stored, weights_only=False)
            assert torch.equal(again(x), sparse)
        sparsiattn.unpatch(again)
        assert torch.equal(again(x), model(x))
        assert type(again.blocks[0]) is Attention

    @pytest.mark.parametrize("form", [plain, modules, columns, einsum])
    def test_compiles_and_exports(self, form: Callable[..., Tensor]) -> None:
        model, x = Model(form) if form is plain else Model(plain), images()
        for block in model.blocks:
            block.form = _at_sixteen(form)
        with torch.no_grad(), patched(model):
            expected = model(x)
            torch.compiler.reset()
            compiled = torch.compile(model, fullgraph=True, backend="eager")
            torch.testing.assert_close(compiled(x), expected, rtol=1e-5, atol=1e-5)
            program = torch.export.export(model, (x,), strict=False).module()
            torch.testing.assert_close(program(x), expected, rtol=1e-5, atol=1e-5)
        torch.compiler.reset()

    def test_trains_as_dense_at_full_budget(self) -> None:
        model, x = Model(), images()
        model(x).square().sum().backward()
        expected = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        model.zero_grad()
        with patched(model, k=1.0):
            model(x).square().sum().backward()
        found = [p.grad for p in model.parameters()]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)

    def test_a_host_that_changed_its_way_is_an_error(self) -> None:
        model = Model()
        with patched(model):
            model.blocks[1].form = _mean
            with pytest.raises(ModelChanged, match=r"another code path|blocks\.1"):
                model(images())

    def test_weights_beside_the_result_are_none(self) -> None:
        model, x = Model(), images()
        with patched(model):
            tokens = x.flatten(2).mT
            assert model.blocks[0](tokens, weights=True)[1] is None
        assert model.blocks[0](tokens, weights=True)[1].shape == (B, H, 16, 16)


def _mean(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return v.mean(-2, keepdim=True).expand_as(v)


def _at_sixteen(form: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The spelling without the tables above, which are for other sizes."""
    simple: dict[Any, Callable[..., Tensor]] = {
        modules: lambda q, k, v: nn.Softmax(-1)(torch.matmul(q, k.mT) / 3.0).matmul(v),
        columns: lambda q, k, v: (v.mT @ (q @ k.mT * 0.2).softmax(-1).transpose(-2, -1)).mT,
    }
    return simple.get(form, form)


@pytest.mark.parametrize("form", [talking_heads, gated])
def test_what_cannot_be_lifted_is_left_with_the_operation(form: Callable[..., Tensor]) -> None:
    model = Model(plain)
    model.blocks[1].form = _gated if form is gated else talking_heads
    with patched(model) as live:
        assert [site.name for site in live.sites] == ["blocks.0"]
        reasons = dict(live.skipped)
        assert ("permute()" if form is talking_heads else "mul()") in reasons["blocks.1"]
        assert "blocks.1" in str(live.report())


def _gated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.mT).softmax(-1) * 0.5) @ v


def test_a_softmax_that_is_no_attention_is_listed() -> None:
    model = Model()
    model.blocks[1].form = lambda q, k, v: q.softmax(-1) * v
    with patched(model) as live:
        assert dict(live.skipped)["blocks.1"] == "its softmax is not attention between tokens"


def test_routes_run_outside_the_lift() -> None:
    """A planner's own products must not be put off."""
    seen: list[type] = []

    def route(call: HostCall) -> Tensor:
        seen.append(type(call.q @ call.k.mT))
        return call.dense()

    with intercepted():
        push(route, 1)
        try:
            lifted(plain, *operands())
            lifted(columns, *operands())
        finally:
            pop(1)
    assert seen == [Tensor, Tensor]
