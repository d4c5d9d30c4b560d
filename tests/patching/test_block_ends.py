"""How blocks end: tokens may leave between attention and MLP only where that changes nothing.

The oracle is the dense model. Tokens that leave at the last block, after its attention, change
nothing that the class token sees, however the block ends; so the logits must be the dense ones, or
the model must be refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import sparsiattn

WIDTH, TOKENS, SHAPE = 24, 17, (1, 3, 32, 32)


class Attention(nn.Module):
    num_heads = 3

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 3, -1).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Norms(nn.Module):
    """A batch norm over all tokens of a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH, momentum=None)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.mT).mT


class Along(nn.Module):
    """A linear layer along the tokens, as in MLP-Mixer."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(TOKENS, TOKENS)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(x.mT).mT


class Of(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Block(nn.Module):
    def __init__(self, end: Callable[[Block, Tensor], Tensor], extra: nn.Module) -> None:
        super().__init__()
        self.n1, self.n2, self.n3 = (nn.LayerNorm(WIDTH) for _ in range(3))
        self.attn, self.end, self.extra = Attention(), end, extra
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 32), nn.GELU(), nn.Linear(32, WIDTH))
        self.gamma = nn.Parameter(torch.full((WIDTH,), 0.7))
        self.scalar = nn.Parameter(torch.tensor(0.3))
        self.place = nn.Parameter(torch.randn(1, TOKENS, WIDTH))
        self.drop_path = nn.Identity()

    def f(self, x: Tensor) -> Tensor:
        return self.mlp(self.n2(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self, x + self.attn(self.n1(x)))


class Model(nn.Module):
    num_prefix_tokens = 1

    def __init__(
        self, end: Callable[[Block, Tensor], Tensor], extra: Callable[[], nn.Module] = nn.Identity
    ) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, WIDTH, 8, 8)
        self.cls_token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.blocks = nn.ModuleList(Block(end, extra()) for _ in range(2))
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        cls = self.cls_token.expand(len(x), -1, -1)
        x = torch.cat([cls, self.patch_embed(x).flatten(2).mT], 1)
        for block in self.blocks:
            x = block(x)
        return self.head(x[:, 0])


def images(count: int = 4) -> Tensor:
    return torch.randn(count, *SHAPE[1:], generator=torch.Generator().manual_seed(0))


@contextmanager
def same_draws() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        yield


def path(x: Tensor, p: float, training: bool) -> Tensor:
    """Stochastic depth, as a function."""
    if not training:
        return x
    return x * (torch.rand(len(x), 1, 1) >= p) / (1 - p)


def subset(b: Block, x: Tensor) -> Tensor:
    """DINOv2's: the branch of half of the images."""
    if not b.training:
        return x + b.f(x)
    half = torch.arange(len(x) // 2)
    return torch.index_add(x, 0, half, b.f(x[half]), alpha=2.0)


def first_images(b: Block, x: Tensor) -> Tensor:
    """The same in place, of at least one image: of one alone it is the plain sum."""
    y, count = x.clone(), max(1, len(x) // 2) if b.training else len(x)
    y[:count] += b.f(x[:count])
    return y


def in_place(b: Block, x: Tensor) -> Tensor:
    y = x + b.f(x)
    y.mul_(2)
    return y


def through_view(b: Block, x: Tensor) -> Tensor:
    y = x + b.f(x)
    y[:, :, : WIDTH // 2].neg_()
    return y


def ignores_result(b: Block, x: Tensor) -> Tensor:
    f = b.f(x)
    b.extra(f)
    return x + f


def writes_into_x(b: Block, x: Tensor) -> Tensor:
    b.extra(x)
    return x + b.f(x)


def masked(b: Block, x: Tensor) -> Tensor:
    return (x + b.f(x)) * (torch.arange(x.shape[1]) % 3 < 2)[:, None]


def own_copy(b: Block, x: Tensor) -> Tensor:
    return (x + b.f(x).contiguous().clone()).contiguous().view(x.shape)


Ends = dict[str, tuple[Callable[[Block, Tensor], Tensor], Callable[[], nn.Module]]]
NONE = nn.Identity
MIDDLE: Ends = {
    "plain": (lambda b, x: x + b.f(x), NONE),
    "turned": (lambda b, x: b.f(x) + x, NONE),
    "alpha 1": (lambda b, x: torch.add(x, b.f(x), alpha=1), NONE),
    "module behind": (lambda b, x: x + b.drop_path(b.f(x)), NONE),
    "dropout module": (lambda b, x: x + b.extra(b.f(x)), lambda: nn.Dropout(0.5)),
    "copies": (own_copy, NONE),
    "identity behind": (lambda b, x: b.extra(x + b.f(x)), NONE),
    "in-place sum": (lambda b, x: x.add_(b.f(x)), NONE),
    "sum in a module": (lambda b, x: b.extra(x), lambda: Residual(Of(torch.tanh))),
    "x written to": (writes_into_x, lambda: nn.ReLU(inplace=True)),
    "layer scale outside": (lambda b, x: x + b.gamma * b.f(x), NONE),
    "layer scale behind": (lambda b, x: b.drop_path(b.f(x)) * b.gamma + x, NONE),
    "scalar outside": (lambda b, x: x + b.scalar * b.f(x), NONE),
    "inner in-place": (lambda b, x: x + b.extra(b.n2(x)), lambda: nn.ReLU(inplace=True)),
}
AFTER: Ends = {
    "alpha": (lambda b, x: torch.add(x, b.f(x), alpha=0.5), NONE),
    "in place": (in_place, NONE),
    "through a view": (through_view, NONE),
    "scaled sum": (lambda b, x: (x + b.f(x)) * 0.5, NONE),
    "masked sum": (masked, NONE),
    "difference": (lambda b, x: x - b.f(x), NONE),
    "addcmul": (lambda b, x: torch.addcmul(x, b.gamma, b.f(x)), NONE),
    "post-norm": (lambda b, x: b.n3(x + b.f(x)), NONE),
    "two branches": (lambda b, x: x + b.f(x) + b.extra(x), lambda: nn.Linear(WIDTH, WIDTH)),
    "branches in one": (lambda b, x: x + (b.f(x) + b.extra(x)), lambda: nn.Linear(WIDTH, WIDTH)),
    "parallel": (lambda b, x: x + b.f(x) + b.extra(b.n3(x)), lambda: nn.Linear(WIDTH, WIDTH)),
    "gate of x": (lambda b, x: x + b.extra(x).sigmoid() * b.f(x), lambda: nn.Linear(WIDTH, 1)),
    "twice": (lambda b, x: 2 * x + b.f(x), NONE),
    "result ignored": (ignores_result, lambda: nn.ReLU(inplace=True)),
    "branch seen again": (lambda b, x: x + (f := b.f(x)) + 0 * f.mean(1, keepdim=True), NONE),
    "norm used twice": (lambda b, x: x + b.mlp(b.n1(x)), NONE),
    "rolled": (lambda b, x: x + b.extra(b.n2(x)), lambda: Of(lambda x: x.roll(1, 1))),
    "softmax": (lambda b, x: x + b.extra(b.n2(x)), lambda: Of(lambda x: x.softmax(1))),
    "pooled": (lambda b, x: x + b.extra(b.n2(x)), lambda: Of(lambda x: x - x.mean(1, True))),
    "along tokens": (lambda b, x: x + b.extra(b.n2(x)), Along),
    "convolution": (
        lambda b, x: x + b.extra(b.n2(x)),
        lambda: Of(lambda x: F.avg_pool1d(x.mT, 3, 1, 1).mT),
    ),
    "scale by place": (lambda b, x: x + b.place * b.f(x), NONE),
    "scale of another module": (lambda b, x: x + b.n3.weight * b.f(x), NONE),
    "scale twice": (lambda b, x: x + b.gamma * (b.gamma * b.f(x)), NONE),
    "scale of both": (lambda b, x: b.gamma * (x + b.f(x)), NONE),
    "scaled and not": (lambda b, x: x + (f := b.f(x)) + b.gamma * f, NONE),
    "scale in place": (lambda b, x: x + b.f(x).mul_(b.gamma), NONE),
    "by place": (lambda b, x: x + b.extra(b.n2(x) * b.place), lambda: nn.Linear(WIDTH, WIDTH)),
    "batch norm": (lambda b, x: x + b.extra(b.n2(x)), Norms),
    "drop path": (lambda b, x: x + path(b.f(x), 0.5, b.training), NONE),
    "dropout": (lambda b, x: x + F.dropout(b.f(x), 0.5, b.training), NONE),
    "all dropped": (lambda b, x: x + F.dropout(b.f(x), 1.0, b.training), NONE),
    "subset": (subset, NONE),
    "first images": (first_images, NONE),
    "training adds": (lambda b, x: x + b.f(x) + (0.1 if b.training else 0), NONE),
}


class Residual(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


def built(name: str) -> Model:
    torch.manual_seed(0)
    return Model(*{**MIDDLE, **AFTER}[name])


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", [*MIDDLE, *AFTER])
def test_tokens_dropped_after_the_last_attention_change_nothing(name: str, training: bool) -> None:
    model, x = built(name).train(training), images()
    if training and name == "dropout module":
        pytest.skip("masks of dropout are drawn for fewer tokens, so others")
    with torch.no_grad():
        with same_draws():
            dense = model(x)
        with sparsiattn.patch(model, "token_drop", keep=5, layers=[1], input=SHAPE), same_draws():
            torch.testing.assert_close(model(x), dense)
        with same_draws():
            torch.testing.assert_close(model(x), dense)


@pytest.mark.parametrize("name", [*MIDDLE, *AFTER])
def test_the_report_says_where_tokens_leave(name: str) -> None:
    with sparsiattn.patch(built(name), "token_drop", keep=5, layers=[1], input=SHAPE) as live:
        text = str(live.report())
    assert ("between attention and MLP" in text) is (name in MIDDLE)
    assert ("after the block" in text) is (name in AFTER)


def test_the_report_names_what_training_adds_and_what_mixes() -> None:
    for name, said in (("drop path", "in training mode"), ("rolled", "blocks.1.extra")):
        with sparsiattn.patch(built(name), "token_drop", keep=5, layers=[1], input=SHAPE) as live:
            assert said in str(live.report())


def test_a_patch_looks_at_training_mode_and_leaves_the_model_alone() -> None:
    model = built("batch norm").eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    sparsiattn.patch(model, "token_drop", keep=5, layers=[1], input=SHAPE)
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class WritesToInput(Block):
    def forward(self, x: Tensor) -> Tensor:
        x += self.attn(self.n1(x))
        x += self.f(x)
        return x


class IgnoresReturned(Model):
    """Its blocks write to their input, and nobody looks at what they return."""

    def __init__(self) -> None:
        super().__init__(MIDDLE["plain"][0])
        self.blocks = nn.ModuleList(
            WritesToInput(MIDDLE["plain"][0], nn.Identity()) for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        cls = self.cls_token.expand(len(x), -1, -1)
        x = torch.cat([cls, self.patch_embed(x).flatten(2).mT], 1)
        for block in self.blocks:
            block(x)
        return self.head(x[:, 0])


def test_blocks_that_write_to_their_input_are_right_or_refused() -> None:
    torch.manual_seed(0)
    model = IgnoresReturned()
    with torch.no_grad():
        dense = model(images())
        with sparsiattn.patch(model, "token_drop", keep=5, layers=[2], input=SHAPE):
            torch.testing.assert_close(model(images()), dense)
        with pytest.raises(sparsiattn.SparsiattnError, match="returned"):
            sparsiattn.patch(model, "token_drop", keep=5, layers=[0], input=SHAPE)
        torch.testing.assert_close(model(images()), dense)


class HalfAttends(Block):
    """DINOv2's stochastic depth on the attention, too."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        half = torch.arange(len(x) // 2)
        x = torch.index_add(x, 0, half, self.attn(self.n1(x[half])), alpha=2.0)
        return subset(self, x)


def test_scores_of_half_of_the_images_are_refused() -> None:
    torch.manual_seed(0)
    model = Model(MIDDLE["plain"][0])
    model.blocks = nn.ModuleList(HalfAttends(subset, nn.Identity()) for _ in range(2))
    x, dense = images(), model.train()(images())
    with sparsiattn.patch(model, "token_drop", keep=5, layers=[1], input=SHAPE):
        model.eval()(x)
        with pytest.raises(sparsiattn.InvalidOption, match="2 of 4 images"):
            model.train()(x)
    with sparsiattn.patch(model, "token_drop", keep=5, layers=[1], score="norm", input=SHAPE):
        torch.testing.assert_close(model(x), dense)


STEPS: dict[str, Callable[[Block, Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "norm": lambda b, x, f: (x, b.n2(f)),
    "mlp": lambda b, x, f: (x, b.mlp(f)),
    "identity": lambda b, x, f: (x, b.drop_path(f)),
    "scale": lambda b, x, f: (x, f * 0.5),
    "gamma": lambda b, x, f: (x, b.gamma * f),
    "softmax": lambda b, x, f: (x, f.softmax(1)),
    "roll": lambda b, x, f: (x, f.roll(1, 1)),
    "twice": lambda b, x, f: (x * 2, f),
    "branch": lambda b, x, f: (x, f + x),
    "copy": lambda b, x, f: (x.clone(), f.clone()),
    "sum": lambda b, x, f: (x + f, f),
    "noise": lambda b, x, f: (x, F.dropout(f, 0.5, b.training)),
}
SUMS: list[Callable[[Tensor, Tensor], Tensor]] = [
    lambda x, f: x + f,
    lambda x, f: f + x,
    lambda x, f: torch.add(x, f, alpha=0.5),
    lambda x, f: x - f,
    lambda x, f: (x + f).neg_(),
    lambda x, f: x + f + 1,
    lambda x, f: torch.lerp(x, f, 0.5),
]


@settings(deadline=None, max_examples=40, derandomize=True)
@given(st.lists(st.sampled_from(sorted(STEPS)), max_size=5), st.integers(0, len(SUMS) - 1))
def test_endings_put_together_at_random(steps: list[str], last: int) -> None:
    def end(block: Block, x: Tensor) -> Tensor:
        f = x
        for step in steps:
            x, f = STEPS[step](block, x, f)
        return SUMS[last](x, f)

    torch.manual_seed(0)
    model, x = Model(end), images(2)
    for training in (False, True):
        model.train(training)
        with torch.no_grad():
            with same_draws():
                dense = model(x)
            patched = sparsiattn.patch(model, "token_drop", keep=5, layers=[1], input=SHAPE)
            with patched, same_draws():
                torch.testing.assert_close(model(x), dense, rtol=1e-4, atol=1e-4)
