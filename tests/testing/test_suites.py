"""Every built-in passes the suites that plug-in authors use."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import ClassVar

import pytest
import torch
from torch import nn

from sparsiattn import list_kernels, list_strategies
from sparsiattn.kernels import (
    FlashAttention4,
    Flex,
    Gather,
    MaskedSDPA,
    Native,
    Natten,
    Reference,
    Triton,
    Varlen,
    XFormers,
)
from sparsiattn.registry import REGISTRY
from sparsiattn.strategies import (
    Connectivity,
    DenseStrategy,
    Hybrid,
    Local,
    Random,
    TokenDrop,
    TokenMerge,
    TopK,
)
from sparsiattn.testing import BackboneSuite, KernelSuite, StrategySuite, TokenStrategySuite
from sparsiattn.testing.kernel import Case
from tests.support import ROOT, zoo
from tests.support.flex_calls import flex_call


class TestDense(StrategySuite):
    strategy = DenseStrategy()
    changes = False


class TestTopK(StrategySuite):
    strategy = TopK(k=0.25)


class TestTopKTilesBackground(StrategySuite):
    strategy = TopK(k=0.25, tile=(4, 4), background=2)


class TestRandom(StrategySuite):
    strategy = Random(k=0.25)


class TestLocal(StrategySuite):
    strategy = Local(k=0.25)


class TestConnectivity(StrategySuite):
    strategy = Connectivity(k=0.25)


class TestConnectivityChannels(StrategySuite):
    strategy = Connectivity(k=20, tile=(2, 2), channels=8, basis_coef_topk=4, background=None)


class TestTokenDrop(TokenStrategySuite):
    strategy = TokenDrop(keep=0.7)


@pytest.mark.slow
class TestTokenDropFuse(TokenStrategySuite):
    strategy = TokenDrop(keep=[0.8, 0.5], layers=[0, 2], fuse=True)


@pytest.mark.slow
class TestTokenDropMeanQuery(TokenStrategySuite):
    strategy = TokenDrop(keep=20, score="mean_query", restore="scatter")


@pytest.mark.slow
class TestTokenDropNorm(TokenStrategySuite):
    strategy = TokenDrop(keep=0.6, score="norm", restore="unfold")


@pytest.mark.slow
class TestTokenDropRandom(TokenStrategySuite):
    strategy = TokenDrop(keep=0.6, score="random")

    def ordered(self) -> bool:
        return True


class TestTokenDropLearned(TokenStrategySuite):
    strategy = TokenDrop(keep=0.6, score="learned")


class TestTokenDropAdaptive(TokenStrategySuite):
    strategy = TokenDrop(keep="adaptive", mass=0.7)
    identity: ClassVar = {"mass": 1.0}


@pytest.mark.slow
class TestTokenDropThresholdFuse(TokenStrategySuite):
    strategy = TokenDrop(keep="adaptive", threshold=0.9, fuse=True)
    identity: ClassVar = {"threshold": 1e-9}


class TestTokenMerge(TokenStrategySuite):
    strategy = TokenMerge(r=5)
    identity: ClassVar = {"r": 0}

    def ordered(self) -> bool:
        return True


@pytest.mark.slow
class TestPiToMe(TokenStrategySuite):
    strategy = TokenMerge(method="pitome", ratio=0.9, proportional=False)
    identity: ClassVar = {"ratio": 1.0}


class TestHybrid(TokenStrategySuite):
    strategy = Hybrid(k=0.25, keep=0.7)
    identity: ClassVar = {"k": 1.0, "keep": 1.0}


@pytest.mark.slow
class TestHybridOfOthers(TokenStrategySuite):
    strategy = Hybrid(k=0.3, attention="local", tokens=TokenMerge(r=6), tile=(2, 2))
    identity: ClassVar = {"k": 1.0, "tokens": TokenMerge(r=0)}

    def ordered(self) -> bool:
        return True


class TestReferenceKernel(KernelSuite):
    kernel = Reference()


class TestMaskedSDPAKernel(KernelSuite):
    kernel = MaskedSDPA()


class TestGatherKernel(KernelSuite):
    kernel = Gather()


@pytest.mark.usefixtures("compiled_native")
class TestNativeKernel(KernelSuite):
    kernel = Native()


class TestTritonKernel(KernelSuite):
    kernel = Triton()


class TestFlexKernel(KernelSuite):
    """One shape, because each compiles for long; tests/kernels/test_flex.py has the sweep."""

    kernel = Flex()
    dtypes = (torch.float32,)

    def cases(self, dtype: torch.dtype) -> Iterator[Case]:
        yield "blocks", *flex_call(dtype=dtype)


class TestXFormersKernel(KernelSuite):
    kernel = XFormers()


class TestVarlenKernel(KernelSuite):
    kernel = Varlen()


class TestFlashAttention4Kernel(KernelSuite):
    kernel = FlashAttention4()


class TestNattenKernel(KernelSuite):
    kernel = Natten()


class _Family(BackboneSuite):
    family = ""

    def model(self) -> nn.Module:
        return zoo.build(self.family)

    def images(self, model: nn.Module) -> torch.Tensor:
        return zoo.images(model)


ADAPTER = {"swin": "timm_swin", "samvit": "timm_sam", "hiera": "timm_hiera"}
for _name in zoo.FAMILIES:
    _title = "Test" + _name.title().replace("_", "") + "Backbone"
    _adapter = REGISTRY.get("backbones", ADAPTER.get(_name, "timm_vit"))
    globals()[_title] = type(_title, (_Family,), {"family": _name, "backbone": _adapter})


class TestGenericBackbone(BackboneSuite):
    backbone = REGISTRY.get("backbones", "generic")

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(12, 2, 24, dropout=0.0, batch_first=True)
        return _TokensFromPixels(layer)

    def images(self, model: nn.Module) -> torch.Tensor:
        return torch.randn(2, 3, 8, 8)


class _TokensFromPixels(nn.Module):
    """A model nobody wrote an adapter for: 64 tokens of plain attention over pixels."""

    def __init__(self, layer: nn.TransformerEncoderLayer) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 12, 1)
        self.qkv = nn.Linear(12, 36)
        self.mlp = layer.linear1

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        tokens = self.embed(images).flatten(2).mT
        q, k, v = self.qkv(tokens).unflatten(-1, (3, 2, 6)).permute(2, 0, 3, 1, 4)
        out = nn.functional.scaled_dot_product_attention(q, 5 * k, v)
        return self.mlp(out.transpose(1, 2).flatten(2)).mean(1)


@pytest.mark.parametrize("kind", ["strategies", "kernels"])
def test_no_builtin_is_left_out(kind: str) -> None:
    suites = _suites()
    if kind == "strategies":
        tested = {s.strategy.name for s in suites if hasattr(s, "strategy")}
        assert tested == {name for name in list_strategies() if _builtin(kind, name)}
    else:
        tested = {s.kernel.name for s in suites if hasattr(s, "kernel")}
        assert tested == {name for name in list_kernels() if _builtin(kind, name)}


def _suites() -> list[type]:
    """Those of this file, and of the files that test published methods."""
    files = sorted((ROOT / "tests" / "methods").glob("test_*.py"))
    modules = [importlib.import_module(f"tests.methods.{file.stem}") for file in files]
    spaces = [globals(), *map(vars, modules)]
    return [thing for space in spaces for thing in space.values() if isinstance(thing, type)]


def _builtin(kind: str, name: str) -> bool:
    return REGISTRY.plugin_of(kind, name).startswith("sparsiattn")
