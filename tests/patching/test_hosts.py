"""Hugging Face's and torchvision's Vision Transformers, and any `nn.MultiheadAttention`."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import sparsiattn
from sparsiattn.registry import REGISTRY
from sparsiattn.testing import BackboneSuite
from tests.support import hosts, zoo

GENERIC = {"encoder"}  # says no input size


def adapter_of(name: str) -> sparsiattn.Backbone:
    return REGISTRY.get("backbones", hosts.HOSTS[name][1])  # type: ignore[no-any-return]


def patch(model: nn.Module, strategy: str = "topk", **options: Any) -> sparsiattn.Patch:
    return sparsiattn.patch(model, strategy, input=(1, 3, 32, 32), **options)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("name", hosts.HOSTS)
class TestEveryHost:
    def test_says_what_it_is(self, name: str) -> None:
        model = hosts.build(name)
        _, adapter, prefix, classes, pooling = hosts.HOSTS[name]
        live = patch(model) if name in GENERIC else sparsiattn.patch(model, "topk")
        assert live.backbone == adapter
        assert live.input_shape == (1, 3, 32, 32)
        assert [site.prefix_tokens for site in live.sites] == [prefix] * 2
        assert {site.grid for site in live.sites} == {(8, 8)}
        assert {site.tokens for site in live.sites} == {64 + prefix}
        backbone = adapter_of(name)
        assert backbone.class_tokens(model) == classes
        assert backbone.pooling(model) == pooling
        if name not in GENERIC:
            assert backbone.patch_size(model) == (4, 4)
        report = live.report()
        assert report.mhsa_macs is not None
        assert report.mhsa_macs < report.mhsa_macs_dense < report.macs_dense

    @pytest.mark.parametrize("strategy", ["topk", "connectivity"])
    def test_identity_change_and_undo(self, name: str, strategy: str) -> None:
        model, x = hosts.OneTensor(hosts.build(name)), hosts.images()
        with torch.no_grad():
            dense = model(x)
            with patch(model, strategy, k=1.0):
                assert relative(model(x), dense) <= 1e-5
            live = patch(model, strategy, k=0.25)
            assert relative(model(x), dense) > 1e-5
            with live.disabled():
                assert torch.equal(model(x), dense)
            assert all(runtime.last_choice is not None for runtime in live.runtimes)
            live.unpatch()
            assert torch.equal(model(x), dense)
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())

    def test_gradients_and_checkpointing(self, name: str) -> None:
        model, x = hosts.OneTensor(hosts.build(name)), hosts.images()  # eval: no dropout
        with patch(model, "connectivity", k=0.3) as live:
            direct = _gradients(model, x)
            assert all(gradient.isfinite().all() for gradient in direct)
            for runtime in live.runtimes:
                _checkpointed(runtime.module)
            for mine, theirs in zip(_gradients(model, x), direct, strict=True):
                torch.testing.assert_close(mine, theirs)

    def test_copies_stay_patched(self, name: str) -> None:
        model, x = hosts.OneTensor(hosts.build(name)), hosts.images()
        with torch.no_grad():
            dense = model(x)
            live = patch(model, k=0.25)
            sparse = model(x)
            for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
                assert torch.equal(twin(x), sparse)
                mine = sparsiattn.patch_of(twin)
                assert mine is not None
                with live.disabled():
                    assert torch.equal(twin(x), sparse)
                with mine.disabled():
                    assert torch.equal(twin(x), dense)
                mine.unpatch()
                assert torch.equal(twin(x), dense)
            assert torch.equal(model(x), sparse)

    @pytest.mark.parametrize("mode", ["no_grad", "inference_mode", "enable_grad", "train"])
    def test_every_mode_is_sparse(self, name: str, mode: str) -> None:
        model, x = hosts.OneTensor(hosts.build(name)), hosts.images()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        model.train(mode == "train")
        with getattr(torch, mode if mode != "train" else "enable_grad")():
            dense = model(x)
            with patch(model, k=0.1, background=2):
                assert relative(model(x).detach(), dense.detach()) > 1e-5


def _gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    wanted = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(model(x).square().sum(), wanted, allow_unused=True)
    return [gradient for gradient in found if gradient is not None]


def _checkpointed(module: nn.Module) -> None:
    """Recompute the module in the backward pass, hooks included."""
    call = type(module).__call__

    class Recomputed(type(module)):  # type: ignore[misc]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return checkpoint(call, self, *args, use_reentrant=False, **kwargs)

    module.__class__ = Recomputed


@pytest.mark.parametrize(
    "name", zoo.slow_but(("vit",), "clip_tower", "beit", "torchvision", "encoder")
)
def test_compiles_to_one_graph(name: str) -> None:
    model, x = hosts.OneTensor(hosts.build(name)), hosts.images()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        dense = model(x)
        with patch(model, "connectivity", k=0.25) as live:
            sparse = model(x)
            torch.testing.assert_close(compiled(x), sparse)
            with live.disabled():
                torch.testing.assert_close(compiled(x), dense)
        torch.testing.assert_close(compiled(x), dense)
    torch.compiler.reset()


class _Suite(BackboneSuite):
    host = ""
    least_sites = 2

    def model(self) -> nn.Module:
        return hosts.OneTensor(hosts.build(self.host))

    def images(self, model: nn.Module) -> Tensor:
        return hosts.images()


for _name in hosts.HOSTS:
    _title = "Test" + _name.title().replace("_", "") + "Backbone"
    globals()[_title] = type(_title, (_Suite,), {"host": _name, "backbone": adapter_of(_name)})
