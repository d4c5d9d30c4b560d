"""The laws of the design over every family and every registered strategy."""

from __future__ import annotations

import copy
import subprocess
import sys
import threading
from contextlib import nullcontext

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn
from torch.nn import functional as F

import sparsiattn
from tests.support import zoo

SPARSE = [name for name in zoo.ATTENTION if name != "dense"]
OTHERS = [name for name in SPARSE if name != "connectivity"]


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


# Hiera's tokens are not in raster order, which `local` refuses
PAIRS = [(f, s) for s in SPARSE for f in zoo.FAMILIES if (f, s) != ("hiera", "local")]


@pytest.mark.parametrize(("family", "strategy"), PAIRS)
class TestEveryFamily:
    def test_identity_change_and_undo(self, family: str, strategy: str) -> None:
        """Laws 1, 4 and 10: exact at full budget, a real change below it, undone bit for bit."""
        model = zoo.build(family)
        x = zoo.images(model)
        with torch.no_grad():
            dense = model(x)
            with sparsiattn.patch(model, strategy, k=1.0):
                assert relative(model(x), dense) <= 1e-5
            live = sparsiattn.patch(model, strategy, k=0.25)
            assert not torch.equal(model(x), dense)
            with live.disabled():
                assert torch.equal(model(x), dense)
            assert all(runtime.last_choice is not None for runtime in live.runtimes)
            live.unpatch()
            assert torch.equal(model(x), dense)
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())

    def test_gradients_and_checkpointing(self, family: str, strategy: str) -> None:
        """Law 6: recomputation in the backward pass takes the same keys."""
        model = zoo.build(family)
        x = zoo.images(model)
        model.train()  # some hosts have dropout of their own: same seed, same draws
        with sparsiattn.patch(model, strategy, k=0.3):
            direct = _gradients(model, x)
            model.set_grad_checkpointing(True)
            for mine, theirs in zip(_gradients(model, x), direct, strict=True):
                torch.testing.assert_close(mine, theirs)


def _gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    torch.manual_seed(3)
    wanted = [p for p in model.parameters() if p.requires_grad]
    loss = model(x).square().sum()
    grads = torch.autograd.grad(loss, wanted, allow_unused=True)
    return [g for g in grads if g is not None]


@pytest.mark.parametrize("family", ["vit", "swin", "hiera", "samvit", "beit"])
class TestHostState:
    def test_dense_checkpoint_loads_strictly(self, family: str) -> None:
        """Law 5: host keys unchanged, planner keys only under ``<site>.sparsiattn.``."""
        model = zoo.build(family)
        dense = copy.deepcopy(model.state_dict())
        with sparsiattn.patch(model, k=0.25) as live:
            first = live.runtimes[0].planner
            first.down.data.fill_(0.5)  # type: ignore[attr-defined]
            model.load_state_dict(dense, strict=True)
            assert (first.down == 0.5).all()  # type: ignore[attr-defined]
            whole = copy.deepcopy(model.state_dict())
            model.load_state_dict(whole, strict=True)
            broken = {n: t for n, t in whole.items() if not n.endswith("sparsiattn.up")}
            with pytest.raises(RuntimeError, match=r"sparsiattn\.up"):
                model.load_state_dict(broken, strict=True)
        assert list(model.state_dict()) == list(dense)

    def test_half_precision_and_autocast(self, family: str) -> None:
        model = zoo.build(family)
        x = zoo.images(model)
        with torch.no_grad(), sparsiattn.patch(model, k=0.25):
            exact = model(x)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                assert relative(model(x).float(), exact) < 0.2
            model.to(torch.bfloat16)
            assert relative(model(x.bfloat16()).float(), exact) < 0.2
            model.to(torch.float64)
            assert model(x.double()).dtype == torch.float64


COMPILED = [(name, tile) for name in ("connectivity", *OTHERS) for tile in ((2, 2), 1)]


@pytest.mark.parametrize(("strategy", "tile"), zoo.slow_but(COMPILED[:1], *COMPILED[1:]))
def test_compile_and_export(strategy: str, tile: object) -> None:
    """Law 6: one graph, same numbers, also with gradient checkpointing."""
    model, x = zoo.build("vit"), torch.randn(2, 3, 32, 32)
    with sparsiattn.patch(model, strategy, k=0.25, tile=tile):
        exact = model(x)
        torch.compiler.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), exact)
        program = torch.export.export(model, (x,))
        torch.testing.assert_close(program.module()(x), exact)
    torch.compiler.reset()


@pytest.mark.parametrize("strategy", zoo.slow_but(("connectivity",), *OTHERS))
def test_compile_with_gradient_checkpointing(strategy: str) -> None:
    """Before torch 2.15 Dynamo refuses state that hooks write inside a checkpoint, unless told that
    the backward pass need not see it (tried on 2.10)."""
    old = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 15)
    model, x = zoo.build("vit").train(), torch.randn(2, 3, 32, 32)
    model.set_grad_checkpointing(True)
    switch = torch._dynamo.config.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=True)
    with sparsiattn.patch(model, strategy, k=0.25), switch if old else nullcontext():
        torch.compiler.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        for mine, theirs in zip(_gradients(compiled, x), _gradients(model, x), strict=True):
            torch.testing.assert_close(mine, theirs)
    torch.compiler.reset()


def test_compile_sees_patch_and_unpatch_and_does_not_recompile() -> None:
    model, x = zoo.build("vit"), torch.randn(2, 3, 32, 32)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        dense = compiled(x)
        with sparsiattn.patch(compiled, k=0.1) as live:
            sparse = compiled(x)
            assert relative(sparse, dense) > 1e-6
            before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
            for _ in range(4):
                compiled(torch.randn(2, 3, 32, 32))
            assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before
            with live.disabled():
                torch.testing.assert_close(compiled(x), dense)
            torch.testing.assert_close(compiled(x), sparse)
        torch.testing.assert_close(compiled(x), dense)
    torch.compiler.reset()


def test_inference_mode_warm_up_does_not_break_training() -> None:
    model, x = zoo.build("vit"), torch.randn(2, 3, 32, 32)
    with sparsiattn.patch(model, "connectivity", k=0.3, tile=(3, 3)):
        with torch.inference_mode():
            model(x)
        model(x).sum().backward()


def test_threads_do_not_see_each_other() -> None:
    """Law 6: patched, disabled and unpatched models side by side give only right answers."""
    patched, plain = zoo.build("vit"), zoo.build("vit")
    x = torch.randn(1, 3, 32, 32)
    live = sparsiattn.patch(patched, "topk", k=0.1)
    wrong: list[str] = []
    with torch.no_grad():
        sparse, dense = patched(x), plain(x)

    def serve(kind: str) -> None:
        with torch.no_grad():
            for _ in range(30):
                if kind == "sparse" and not torch.equal(patched(x), sparse):
                    wrong.append(kind)
                if kind == "plain" and not torch.equal(plain(x), dense):
                    wrong.append(kind)
                if kind == "disabled":
                    with live.disabled():
                        if not torch.equal(patched(x), dense):
                            wrong.append(kind)

    workers = [
        threading.Thread(target=serve, args=(k,)) for k in ("sparse", "plain", "disabled") * 2
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    live.unpatch()
    assert wrong == []


class _Raises(nn.Module):
    def forward(self, *_: object) -> Tensor:
        raise RuntimeError("on purpose")


def test_a_module_that_raises_leaves_nothing_behind() -> None:
    """Law 4 after a module raised half-way, inside the attention's own scope."""
    model, x = zoo.build("vit"), torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        dense = model(x)
        live = sparsiattn.patch(model, k=0.25)
        sparse = model(x)
        projection, model.blocks[0].attn.proj = model.blocks[0].attn.proj, _Raises()
        with pytest.raises(RuntimeError, match="on purpose"):
            model(x)
        with pytest.raises(AssertionError, match="height"):
            model(torch.randn(1, 3, 31, 31))
        model.blocks[0].attn.proj = projection
        assert F.scaled_dot_product_attention(x, x, x).shape == x.shape
        assert torch.equal(model(x), sparse)
        live.unpatch()
        assert torch.equal(model(x), dense)


def test_users_own_hooks_survive_and_are_not_run_by_the_probe() -> None:
    model, seen = zoo.build("vit"), []
    handle = model.blocks[0].attn.register_forward_hook(lambda *_: seen.append(1))
    state = torch.get_rng_state()
    with sparsiattn.patch(model, k=0.25):
        assert seen == []
        assert torch.equal(torch.get_rng_state(), state)
        model(torch.randn(1, 3, 32, 32))
    assert seen == [1]
    assert len(model.blocks[0].attn._forward_hooks) == 1
    handle.remove()


def test_someone_elses_replacement_of_attention_still_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    before = F.scaled_dot_product_attention

    def counted(*args: object, **kwargs: object) -> Tensor:
        calls.append(1)
        return before(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
    model, x = zoo.build("vit"), torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        dense = model(x)
        with sparsiattn.patch(model, "topk", k=0.1, kernel="sdpa"):
            calls.clear()
            assert not torch.equal(model(x), dense)
            assert len(calls) == 2


HEAVY = [
    "timm", "transformers", "xformers", "triton", "matplotlib", "natten", "flash_attn"
]  # fmt: skip
FRESH = f"""
import sys, sparsiattn
print(sorted(m for m in sys.modules if m == "torch" or m.startswith("sparsiattn.")))
sparsiattn.patch; print([m for m in {HEAVY} if m in sys.modules])
"""


def test_import_is_light() -> None:
    """Law 9, in a fresh process: nothing before a name is used, nothing optional then."""
    out = subprocess.run([sys.executable, "-c", FRESH], capture_output=True, text=True, check=True)
    assert out.stdout.splitlines() == ["[]", "[]"]


@pytest.mark.parametrize("batch", [1, 4])
def test_empty_and_odd_batches(batch: int) -> None:
    model = zoo.build("vit")
    with torch.no_grad(), sparsiattn.patch(model, k=0.25, tile=(3, 3)):
        assert model(torch.randn(batch, 3, 32, 32)).shape == (batch, 5)
        assert model(torch.randn(0, 3, 32, 32)).shape == (0, 5)


def test_data_parallel_replicas_use_their_own_planners() -> None:
    model, x = zoo.build("vit"), torch.randn(1, 3, 32, 32)
    with torch.no_grad(), sparsiattn.patch(model, k=0.25):
        exact = model(x)
        replica = model._replicate_for_data_parallel()
        assert replica is not model
        module = model.blocks[0].attn._replicate_for_data_parallel()
        module._modules["sparsiattn"] = copy.deepcopy(module._modules["sparsiattn"])
        module._modules["sparsiattn"].up.data.zero_()
        tokens = torch.randn(1, 65, 48)
        assert not torch.equal(module(tokens), model.blocks[0].attn(tokens))
        assert torch.equal(model(x), exact)
