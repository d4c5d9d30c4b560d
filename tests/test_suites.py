"""Every built-in passes the suites that plug-in authors use."""

from __future__ import annotations

import pytest
import torch
import zoo
from torch import nn

from sparsiattn import kernels, strategies
from sparsiattn.kernels.gather import Gather
from sparsiattn.kernels.reference import Reference
from sparsiattn.kernels.sdpa import MaskedSDPA
from sparsiattn.registry import REGISTRY
from sparsiattn.strategies.connectivity import Connectivity
from sparsiattn.strategies.dense import DenseStrategy
from sparsiattn.strategies.local import Local
from sparsiattn.strategies.random import Random
from sparsiattn.strategies.topk import TopK
from sparsiattn.testing import BackboneSuite, KernelSuite, StrategySuite


class TestDense(StrategySuite):
    strategy = DenseStrategy()


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


class TestReferenceKernel(KernelSuite):
    kernel = Reference()


class TestMaskedSDPAKernel(KernelSuite):
    kernel = MaskedSDPA()


class TestGatherKernel(KernelSuite):
    kernel = Gather()


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
    suites = [thing for thing in globals().values() if isinstance(thing, type)]
    if kind == "strategies":
        tested = {s.strategy.name for s in suites if hasattr(s, "strategy")}
        assert tested == {name for name in strategies() if _builtin(kind, name)}
    else:
        tested = {s.kernel.name for s in suites if hasattr(s, "kernel")}
        assert tested == {name for name in kernels() if _builtin(kind, name)}


def _builtin(kind: str, name: str) -> bool:
    return REGISTRY.plugin_of(kind, name).startswith("sparsiattn")
