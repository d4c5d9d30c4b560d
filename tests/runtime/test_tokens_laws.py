"""The laws of the design for token strategies, over every family that keeps one sequence."""

from __future__ import annotations

import copy
import io
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import timm
import torch
import torch._dynamo
from torch import Tensor, nn
from torch.nn import functional as F

import sparsiattn
from sparsiattn.strategies import TokenMerge
from tests.support import zoo

HIERARCHICAL = ("swin", "samvit", "hiera")
PLAIN = [family for family in zoo.FAMILIES if family not in HIERARCHICAL]

# strategy, options below budget, options that keep all
SPECS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "cls": ("token_drop", {"keep": 0.6, "layers": [0]}, {"keep": 1.0}),
    "fuse": ("token_drop", {"keep": 0.5, "fuse": True, "layers": [0, 1]}, {"keep": 1.0}),
    "mean": ("token_drop", {"keep": 0.6, "score": "mean_query", "layers": [0]}, {"keep": 1.0}),
    "norm": ("token_drop", {"keep": 20, "score": "norm", "layers": [0, 1]}, {"keep": 1.0}),
    "random": ("token_drop", {"keep": 0.6, "score": "random", "layers": [0]}, {"keep": 1.0}),
    "learned": ("token_drop", {"keep": 0.6, "score": "learned", "layers": [1]}, {"keep": 1.0}),
    "tome": ("token_merge", {"r": 12}, {"r": 0}),
    "plain": ("token_merge", {"r": [12, 9], "proportional": False}, {"r": [0, 0]}),
    "pitome": ("token_merge", {"method": "pitome", "ratio": 0.7}, {"ratio": 1.0}),
    "pitome_last": (
        "token_merge", {"method": "pitome", "ratio": 0.7, "bsm": "last", "proportional": False},
        {"ratio": 1.0},
    ),
    "hybrid": (
        "hybrid", {"k": 0.4, "keep": 0.6, "layers": [0], "only_if_faster": False},
        {"k": 1.0, "keep": 1.0},
    ),
    "hybrid_merge": (
        "hybrid",
        {"k": 0.4, "attention": "topk", "tokens": TokenMerge(r=12), "only_if_faster": False},
        {"k": 1.0, "tokens": TokenMerge(r=0)},
    ),
}  # fmt: skip
FEW = ["cls", "fuse", "learned", "tome", "pitome", "hybrid"]


def crossed(families: list[str], specs: list[str], fully: list[str]) -> list[Any]:
    """Every family with every spec; what neither the families gone through ``fully`` nor the two
    basic specs cover is slow."""
    return [
        pytest.param(f, s, marks=[] if f in fully or s in ("cls", "tome") else [pytest.mark.slow])
        for f in families
        for s in specs
    ]


def patched(model: nn.Module, spec: str, **changes: Any) -> sparsiattn.Patch:
    name, options, _ = SPECS[spec]
    return sparsiattn.patch(model, name, **{**options, **changes})


def full(model: nn.Module, spec: str) -> sparsiattn.Patch:
    return patched(model, spec, **SPECS[spec][2])


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@contextmanager
def outputs_of(module: nn.Module) -> Iterator[list[Tensor]]:
    """What a block returns, as the model that goes on sees it."""
    seen: list[Tensor] = []
    hook = module.register_forward_hook(lambda _, __, out: seen.append(out))
    try:
        yield seen
    finally:
        hook.remove()


def traces(model: nn.Module) -> list[Any]:
    return [
        (
            name,
            id(module),
            sorted(vars(module)),
            sorted(module._modules),
            getattr(module, "fused_attn", None),
            [len(hooks) for at, hooks in sorted(vars(module).items()) if at.endswith("_hooks")],
        )
        for name, module in model.named_modules()
    ]


def gradients(model: Callable[..., Tensor], wanted: list[Tensor], x: Tensor) -> list[Tensor]:
    torch.manual_seed(3)
    grads = torch.autograd.grad(model(x).square().sum(), wanted, allow_unused=True)
    return [g for g in grads if g is not None]


def weights(model: nn.Module) -> list[Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize(("family", "spec"), crossed(PLAIN, list(SPECS), ["vit"]))
class TestEveryFamily:
    def test_identity_change_and_undo(self, family: str, spec: str) -> None:
        model = zoo.build(family)
        x = zoo.images(model)
        before, keys = traces(model), list(model.state_dict())
        with torch.no_grad():
            dense = model(x)
            with full(model, spec):
                assert relative(model(x), dense) <= 1e-5
            live = patched(model, spec)
            sparse = model(x)
            assert relative(sparse, dense) > 1e-6
            with live.disabled():
                assert torch.equal(model(x), dense)
            assert torch.equal(model(x), sparse)
            live.unpatch()
            assert torch.equal(model(x), dense)
        assert traces(model) == before
        assert list(model.state_dict()) == keys

    def test_fewer_tokens_arrive_and_prefix_tokens_survive(self, family: str, spec: str) -> None:
        model = zoo.build(family)
        x = zoo.images(model)
        with torch.no_grad(), outputs_of(model.blocks[-1]) as seen:
            model(x)
            with patched(model, spec) as live:
                model(x)
                source, prefix = live.source(), live.sites[0].prefix_tokens
                back = live.restores_last  # for heads that average merged tokens
        whole = seen[0].shape[1]
        assert back == (seen[1].shape[1] == whole)
        short = int(source.max()) + 1 if back else seen[1].shape[1]
        assert short < whole
        assert source.shape == (len(x), whole)
        assert source[:, :prefix].eq(torch.arange(prefix)).all()
        assert int(source.max()) == short - 1, "source() must speak of the final sequence"

    def test_images_do_not_influence_each_other(self, family: str, spec: str) -> None:
        model = zoo.build(family)
        x = zoo.images(model, batch=3)
        with torch.no_grad(), patched(model, spec):
            together = model(x)
            alone = torch.cat([model(x[i : i + 1]) for i in range(3)])
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)

    def test_an_empty_batch(self, family: str, spec: str) -> None:
        if family in ("eva_rope", "dinov3", "beit"):
            pytest.skip("the host itself cannot take one")
        model = zoo.build(family)
        with torch.no_grad(), patched(model, spec):
            assert model(zoo.images(model)[:0]).shape[0] == 0

    def test_gradients_and_checkpointing(self, family: str, spec: str) -> None:
        """Recomputation must take the same tokens, also after another forward pass."""
        model = zoo.build(family)
        x = zoo.images(model)
        with patched(model, spec):
            wanted = weights(model)
            direct = gradients(model, wanted, x)
            assert all(torch.isfinite(g).all() for g in direct)
            assert any(g.abs().max() > 0 for g in direct)
            model.set_grad_checkpointing(True)
            for mine, theirs in zip(gradients(model, wanted, x), direct, strict=True):
                torch.testing.assert_close(mine, theirs)
            first, second = model(x), model(x.flip(0))
            loss = first.square().sum() + 0 * second.sum()
            late = torch.autograd.grad(loss, wanted, allow_unused=True)
            for mine, theirs in zip([g for g in late if g is not None], direct, strict=True):
                torch.testing.assert_close(mine, theirs)

    @pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
    def test_dtypes(self, family: str, spec: str) -> None:
        model = zoo.build(family)
        x = zoo.images(model)
        with torch.no_grad(), patched(model, spec):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                assert torch.isfinite(model(x)).all()
            model.bfloat16()
            assert model(x.bfloat16()).isfinite().all()
            model.double()
            assert model(x.double()).dtype == torch.float64


@pytest.mark.parametrize("spec", FEW)
class TestCopies:
    def test_deepcopy_and_pickle_stay_patched(self, spec: str) -> None:
        model = zoo.build("eva_rope")
        x = zoo.images(model)
        with torch.no_grad():
            dense = model(x)
            live = patched(model, spec)
            sparse = model(x)
            file = io.BytesIO()
            torch.save(model, file)
            file.seek(0)
            twins = [copy.deepcopy(model), torch.load(file, weights_only=False)]
            live.unpatch()
            for twin in twins:
                other = sparsiattn.patch_of(twin)
                assert other is not None
                assert torch.equal(twin(x), sparse)
                assert twin.forward_features(x).shape == model.forward_features(x).shape
                with other.disabled():
                    assert torch.equal(twin(x), dense)
                other.unpatch()
                assert torch.equal(twin(x), dense)
                assert "forward_features" not in vars(twin)

    def test_threads_do_not_see_each_other(self, spec: str) -> None:
        model, plain = zoo.build("vit"), zoo.build("vit")
        x = zoo.images(model, batch=1)
        live, wrong = patched(model, spec), []
        with torch.no_grad():
            sparse, dense = model(x), plain(x)
            maps = model.forward_features(x)

        def serve(kind: str) -> None:
            with torch.no_grad():
                for _ in range(12):
                    with live.disabled() if kind == "off" else nullcontext():
                        right = {"off": dense, "on": sparse, "plain": dense, "maps": maps}[kind]
                        host = plain if kind == "plain" else model
                        run = host.forward_features if kind == "maps" else host
                        if not torch.equal(run(x), right):
                            wrong.append(kind)

        workers = [
            threading.Thread(target=serve, args=(k,)) for k in ("off", "on", "plain", "maps")
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert wrong == []

    def test_warm_up_in_inference_mode_does_not_break_training(self, spec: str) -> None:
        model = zoo.build("beit")
        x = zoo.images(model)
        with torch.inference_mode():
            live = patched(model, spec)
            model(x)
            live.source()
        model(x).sum().backward()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)

    @pytest.mark.parametrize("where", ["blocks.0.attn.proj", "blocks.1.mlp", "norm"])
    def test_a_module_that_raises_leaves_nothing_behind(self, spec: str, where: str) -> None:
        model = zoo.build("vit_registers")
        x = zoo.images(model)
        with torch.no_grad():
            dense = model(x)
            live = patched(model, spec)
            sparse = model(x)
            hook = model.get_submodule(where).register_forward_hook(_raise)
            for run in (model, model.forward_features):
                with pytest.raises(RuntimeError, match="on purpose"):
                    run(x)
            hook.remove()
            assert F.scaled_dot_product_attention(x, x, x).shape == x.shape
            assert torch.equal(model(x), sparse)
            live.unpatch()
            assert torch.equal(model(x), dense)


def _raise(*_: object) -> None:
    raise RuntimeError("on purpose")


COMPILED = [spec for spec in SPECS if spec not in ("mean", "plain", "cls", "tome")]


@pytest.mark.parametrize("family", zoo.slow_but(("vit",), "eva_rope", "vit_relpos"))
@pytest.mark.parametrize("spec", zoo.slow_but(("cls",), "tome", *COMPILED))
class TestCompiler:
    def test_one_graph_and_export(self, family: str, spec: str) -> None:
        model = zoo.build(family)
        x = zoo.images(model)
        with torch.no_grad(), patched(model, spec):
            exact = model(x)
            torch.compiler.reset()
            inside = torch.compile(lambda x: model(x), fullgraph=True, backend="aot_eager")
            torch.testing.assert_close(inside(x), exact, rtol=1e-4, atol=1e-5)
            torch.compiler.reset()
            compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
            torch.testing.assert_close(compiled(x), exact, rtol=1e-4, atol=1e-5)
            graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
            for scale in (0.5, 2.0, 3.0):
                torch.testing.assert_close(compiled(x * scale), model(x * scale))
            assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
            program = torch.export.export(model, (x,))
            torch.testing.assert_close(program.module()(x), exact)
        torch.compiler.reset()

    def test_compile_with_gradient_checkpointing(self, family: str, spec: str) -> None:
        """Blocks hand state to later blocks, which Dynamo allows inside a checkpoint only if told
        that the backward pass need not see it."""
        model = zoo.build(family)
        x = zoo.images(model)
        switch = torch._dynamo.config.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=True)
        with patched(model, spec), switch:
            wanted = weights(model)
            direct = gradients(model, wanted, x)
            model.set_grad_checkpointing(True)
            torch.compiler.reset()
            compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
            for mine, theirs in zip(gradients(compiled, wanted, x), direct, strict=True):
                torch.testing.assert_close(mine, theirs)
        torch.compiler.reset()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("spec", FEW)
def test_checkpointing_below_the_first_reduction(
    spec: str, train: bool, reentrant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks before the first reduction run again last, and must not see what came after them."""
    model = zoo._vit(depth=4).train(train)
    x = zoo.images(model).requires_grad_()
    monkeypatch.setattr(timm.layers.config, "_USE_REENTRANT_CKPT", reentrant)
    assert timm.layers.use_reentrant_ckpt() == reentrant
    lost = spec == "learned" and train and reentrant
    refused = pytest.raises(sparsiattn.ModelChanged, match="use_reentrant=False")
    with patched(model, spec, **({"r": 9} if spec == "tome" else {}), layers=[1, 2]):
        direct = parameter_gradients(model, x)
        model.set_grad_checkpointing(True)
        with refused if lost else nullcontext():
            for name, grad in parameter_gradients(model, x).items():
                torch.testing.assert_close(grad, direct[name], msg=name)


def parameter_gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    torch.manual_seed(3)
    model.zero_grad()
    model(x).square().sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@contextmanager
def hidden_keys(model: nn.Module, block: nn.Module, keep: Tensor) -> Iterator[None]:
    """The definition of dropping: from ``block`` on no query sees the keys where ``keep`` [B, N]
    is False, while all rows are still computed."""
    original, inside = F.scaled_dot_product_attention, [False]

    def masked(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **rest: Any):
        if inside[0]:
            bias = torch.zeros(len(keep), 1, 1, k.shape[-2], dtype=q.dtype)
            bias = bias.masked_fill(~keep[:, None, None], float("-inf"))
            attn_mask = bias if attn_mask is None else attn_mask + bias
        return original(q, k, v, attn_mask=attn_mask, **rest)

    hook = block.register_forward_pre_hook(lambda *_: inside.__setitem__(0, True))
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = True
    F.scaled_dot_product_attention = masked
    try:
        yield
    finally:
        F.scaled_dot_product_attention = original
        hook.remove()


@pytest.mark.parametrize("spec", ["cls", "norm"])
@pytest.mark.parametrize("family", PLAIN)
def test_dropping_is_masking_of_keys(family: str, spec: str) -> None:
    """Rows that stay have the values, and the positions, of a model that never sees the others."""
    model = zoo.build(family)
    x = zoo.images(model, batch=3)
    with torch.no_grad(), outputs_of(model.blocks[-1]) as seen:
        with patched(model, spec, layers=[0]) as live:
            model(x)
            source = live.source()
        keep = source >= 0
        assert int((~keep).sum()) > 0
        with hidden_keys(model, model.blocks[1], keep):
            model(x)
    short, whole = seen
    rows = whole[keep].view(short.shape)
    torch.testing.assert_close(short, rows, rtol=1e-4, atol=1e-5)
    prefix = int(live.sites[0].prefix_tokens)
    if spec != "random":
        assert not torch.equal(keep[0, prefix:], keep[1, prefix:]), "images must differ in tokens"


USUAL = [("swin", "norm"), ("samvit", "random"), ("hiera", "learned")]
CROSSED = [(f, s) for f in HIERARCHICAL for s in ("norm", "random", "learned")]


@pytest.mark.parametrize(
    ("family", "score"), zoo.slow_but(USUAL, *(pair for pair in CROSSED if pair not in USUAL))
)
def test_hierarchies_ignore_the_batch(family: str, score: str) -> None:
    model = zoo.build(family)
    x = zoo.images(model)
    options = {"score": score, "keep": 0.5, "layers": [0, 1]}
    with torch.no_grad(), sparsiattn.patch(model, "token_drop", **options):
        torch.testing.assert_close(model(x[:1]), model(x)[:1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "score"), zoo.slow_but(USUAL[:1], *(pair for pair in CROSSED if pair != USUAL[0]))
)
def test_hierarchies_compile(family: str, score: str) -> None:
    model = zoo.build(family)
    x = zoo.images(model)
    options = {"score": score, "keep": 0.5, "layers": [0, 1]}
    with torch.no_grad(), sparsiattn.patch(model, "token_drop", **options):
        exact = model(x)
        torch.compiler.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), exact, rtol=1e-4, atol=1e-5)
    torch.compiler.reset()


@pytest.mark.parametrize("score", ["norm", "random", "learned"])
@pytest.mark.parametrize("family", HIERARCHICAL)
class TestHierarchies:
    def test_identity_and_undo(self, family: str, score: str) -> None:
        model = zoo.build(family)
        x = zoo.images(model)
        before = traces(model)
        with torch.no_grad():
            dense = model(x)
            with sparsiattn.patch(model, "token_drop", score=score, keep=1.0, layers=[0, 1]):
                assert relative(model(x), dense) <= 1e-5
            live = sparsiattn.patch(model, "token_drop", score=score, keep=0.5, layers=[0, 1])
            assert relative(model(x), dense) > 1e-6
            with live.disabled():
                assert torch.equal(model(x), dense)
            live.unpatch()
            assert torch.equal(model(x), dense)
        assert traces(model) == before

    def test_gradients_and_checkpointing(self, family: str, score: str) -> None:
        model = zoo.build(family)
        x = zoo.images(model)
        with sparsiattn.patch(model, "token_drop", score=score, keep=0.5, layers=[0, 1]):
            wanted = weights(model)
            direct = gradients(model, wanted, x)
            model.set_grad_checkpointing(True)
            for mine, theirs in zip(gradients(model, wanted, x), direct, strict=True):
                torch.testing.assert_close(mine, theirs)
            first, second = model(x), model(x.flip(0))
            loss = first.square().sum() + 0 * second.sum()
            late = torch.autograd.grad(loss, wanted, allow_unused=True)
            for mine, theirs in zip([g for g in late if g is not None], direct, strict=True):
                torch.testing.assert_close(mine, theirs)
