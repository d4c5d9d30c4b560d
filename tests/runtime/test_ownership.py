"""A route serves only the module that opened it, and a sequence only the model that runs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

import sparsiattn

TINY = {"img_size": 64, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 3}
STRATEGIES: dict[str, dict[str, Any]] = {
    "topk": {"k": 0.2},
    "token_drop": {"keep": 0.5},
    "token_merge": {"r": 4},
    "hybrid": {"k": 0.3, "keep": 0.5, "only_if_faster": False},
}


def vit(seed: int = 0, **options: Any) -> Any:
    torch.manual_seed(seed)
    return VisionTransformer(**{**TINY, "num_classes": 5, **options}).eval()


def images(seed: int = 1) -> Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("where", ["blocks.1.attn", "blocks.1.attn.qkv", "blocks.1.mlp"])
def test_a_model_in_a_hook_runs_dense(strategy: str, where: str) -> None:
    model, other, x, seen = vit(), vit(1), images(), []
    with torch.no_grad():
        dense = other(x)
        with sparsiattn.patch(model, strategy, **STRATEGIES[strategy]):
            alone = model(x)
            part = model.get_submodule(where)
            hook = part.register_forward_hook(lambda *_: seen.append(other(x)))
            assert torch.equal(model(x), alone)
            hook.remove()
    assert len(seen) == 1
    assert torch.equal(seen[0], dense)


class Inner(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        heads = x.unflatten(-1, (3, -1)).transpose(1, 2)
        return F.scaled_dot_product_attention(heads, heads, heads).transpose(1, 2).flatten(2)


class Nested(nn.Module):
    """Attention whose values are what another attention returns."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.inner = nn.Linear(48, 144), Inner()

    def forward(self, x: Tensor, **_: Any) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        q, k, v = (t.unflatten(-1, (3, -1)).transpose(1, 2) for t in (q, k, self.inner(v)))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def nested() -> Any:
    model = vit(class_token=False, global_pool="avg")
    for block in model.blocks:
        block.attn = Nested().eval()
    return model


@pytest.mark.parametrize("chosen", ["outer", "inner"])
def test_sites_leave_nested_attention_dense(chosen: str) -> None:
    """Against the masked softmax of the chosen one alone."""
    model, x = nested(), torch.randn(2, 64, 48)
    attn = model.blocks[0].attn
    with torch.no_grad():
        inner = attn.inner(attn.qkv(x).chunk(3, -1)[2])
        names = "*.attn" if chosen == "outer" else "*.inner"
        with sparsiattn.patch(
            model, "topk", k=0.2, sites=names, background=None, input=(1, 3, 64, 64)
        ) as live:
            assert len(live.sites) == 4
            seen: list[Tensor] = []
            attn.inner.register_forward_hook(lambda *args: seen.append(args[2]))
            model.blocks[0].attn(x)
    assert torch.equal(seen[0], inner) == (chosen == "outer")


class Teacher(nn.Module):
    """Shares all blocks with a student, and has its own ends."""

    def __init__(self, student: Any) -> None:
        super().__init__()
        self.embed, self.layers = copy.deepcopy(student.patch_embed), student.blocks
        self.head = nn.Linear(48, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(self.embed(x)).mean(1))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_teacher_that_shares_blocks_runs_dense_and_is_listed(strategy: str) -> None:
    student, x = vit(), images()
    teacher = Teacher(student).eval()
    with torch.no_grad():
        taught = teacher(x)
        with sparsiattn.patch(student, strategy, **STRATEGIES[strategy]) as live:
            sparse = student(x)
            assert "Teacher" not in str(live.report())
            assert torch.equal(teacher(x), taught)
            assert "Teacher" in str(live.report())
            assert torch.equal(student(x), sparse)
            # called by the student meanwhile, and in its turn calling it
            late: list[Tensor] = []
            hook = student.norm.register_forward_hook(lambda *_: late.append(teacher(x)))
            assert torch.equal(student(x), sparse)
            hook.remove()
            hook = teacher.head.register_forward_hook(lambda *_: late.append(student(x)))
            assert torch.equal(teacher(x), taught)
            hook.remove()
    assert torch.equal(late[0], taught)
    assert torch.equal(late[1], sparse)


@pytest.mark.parametrize("strategy", ["token_drop", "token_merge", "hybrid"])
def test_a_wrapper_around_the_patched_model_is_no_other_model(strategy: str) -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vit = vit()

        def forward(self, x: Tensor) -> Tensor:
            tokens: Tensor = self.vit._pos_embed(self.vit.patch_embed(x))
            return self.vit.blocks(tokens)

    wrapper, x = Wrapper().eval(), images()
    with torch.no_grad():
        dense = wrapper(x)
        with sparsiattn.patch(wrapper.vit, strategy, **STRATEGIES[strategy]):
            out = wrapper(x)
            features = wrapper.vit.forward_features(x)
            torch.testing.assert_close(wrapper.vit.norm(out), features)
    assert out.shape == dense.shape
    assert not torch.equal(out, dense)


def test_a_copied_part_of_a_patched_model_is_sparse_and_whole() -> None:
    model, x = vit(), images()
    with torch.no_grad(), sparsiattn.patch(model, "token_drop", keep=0.5):
        tokens = model._pos_embed(model.patch_embed(x))
        blocks = copy.deepcopy(model.blocks)
        assert torch.equal(blocks(tokens), model.blocks(tokens))
        assert blocks(tokens).shape == tokens.shape


class Two(nn.Module):
    def __init__(self, left: Any, right: Any) -> None:
        super().__init__()
        self.left, self.right = left, right

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.left(x), self.right(x)], 1)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_towers_are_two_models(strategy: str) -> None:
    model, x, want = Two(vit(), vit(1)).eval(), images(), []
    options = STRATEGIES[strategy]
    with torch.no_grad():
        for part in (model.left, model.right):
            with sparsiattn.patch(part, strategy, **options):
                want.append(part(x))
        with sparsiattn.patch(model, strategy, input=(1, 3, 64, 64), **options) as live:
            torch.testing.assert_close(model(x), torch.cat(want, 1))
            if strategy != "topk":
                with pytest.raises(sparsiattn.InvalidOption, match="towers"):
                    live.source()


def test_two_towers_of_other_depths_or_in_turns_are_refused_by_name() -> None:
    deep = Two(vit(), vit(1, depth=8)).eval()
    with pytest.raises(sparsiattn.InvalidOption, match=r"patch\(model\.left\)"):
        sparsiattn.patch(deep, "token_drop", input=(1, 3, 64, 64))

    class InTurns(Two):
        def forward(self, x: Tensor) -> Tensor:
            a, b = (m._pos_embed(m.patch_embed(x)) for m in (self.left, self.right))
            for left, right in zip(self.left.blocks, self.right.blocks, strict=True):
                a, b = left(a), right(b)
            return torch.cat([a[:, 0], b[:, 0]], 1)

    with pytest.raises(sparsiattn.InvalidOption, match="towers"):
        sparsiattn.patch(InTurns(vit(), vit(1)).eval(), "token_drop", input=(1, 3, 64, 64))


def test_one_tower_on_two_images() -> None:
    shared = vit()

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vit = shared

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.vit(x), self.vit(x.flip(3))], 1)

    model, x = Pair().eval(), images()
    with torch.no_grad():
        with sparsiattn.patch(shared, "token_drop", keep=0.5):
            want = torch.cat([shared(x), shared(x.flip(3))], 1)
        with sparsiattn.patch(model, "token_drop", keep=0.5, input=(1, 3, 64, 64)):
            torch.testing.assert_close(model(x), want)


class Recurrent(VisionTransformer):
    """The same blocks several times over."""

    times = 4

    def forward_features(self, x: Tensor, **_: Any) -> Tensor:
        tokens = self._pos_embed(self.patch_embed(x))
        for _ in range(self.times):
            tokens = self.blocks(tokens)
        return self.norm(tokens)


def recurrent(depth: int = 1) -> Any:
    torch.manual_seed(0)
    return Recurrent(**{**TINY, "depth": depth, "num_classes": 5}).eval()


@pytest.mark.parametrize("compiled", [False, True])
def test_one_block_applied_several_times(compiled: bool) -> None:
    """As the same block four times in a row, with its weights."""
    model, unrolled, x = recurrent(), vit(), images()
    state = {n: p for n, p in model.state_dict().items() if not n.startswith("blocks")}
    for i in range(4):
        state |= {f"blocks.{i}.{n}": p for n, p in model.blocks[0].state_dict().items()}
    unrolled.load_state_dict(state)
    with torch.no_grad():
        with sparsiattn.patch(unrolled, "token_drop", keep=0.5, layers=[0, 1, 2, 3]) as live:
            want, source = unrolled(x), live.source()
        with sparsiattn.patch(model, "token_drop", keep=0.5) as live:
            torch.compiler.reset()
            run = torch.compile(model, backend="eager", fullgraph=True) if compiled else model
            torch.testing.assert_close(run(x), want)
            if not compiled:
                assert torch.equal(live.source(), source)
            for count in ("64", "32", "16", "8"):
                assert f"{count} patch tokens" in str(live.report()) or f"{count}, then" in str(
                    live.report()
                )
            torch.testing.assert_close(model.forward_features(x).shape, (2, 65, 48))
    torch.compiler.reset()


def test_two_blocks_in_turns_several_times() -> None:
    model, x = recurrent(depth=2), images()
    with torch.no_grad(), sparsiattn.patch(model, "token_merge", r=2, layers=[1]) as live:
        model(x)
        assert live.source().shape == (2, 65)
        assert int(live.source().max()) == 64 - 4 * 2


def test_tokens_that_change_between_applications_are_refused() -> None:
    class Changed(Recurrent):
        def forward_features(self, x: Tensor, **_: Any) -> Tensor:
            tokens = self._pos_embed(self.patch_embed(x))
            for _ in range(3):
                tokens = self.blocks[0](tokens) * 0.5
            return tokens

    model = Changed(**{**TINY, "depth": 1, "num_classes": 5}).eval()
    with pytest.raises(sparsiattn.InvalidOption, match="more than once"):
        sparsiattn.patch(model, "token_drop", keep=0.5)
