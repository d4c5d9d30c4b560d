"""Compiled programs of an unpatched copy: Dynamo keeps them by code, and guards no hooks."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import VisionTransformer

import sparsiattn
from tests.support import zoo

LINES: dict[str, tuple[str, dict[str, Any]]] = {
    "sites": ("vit", {"strategy": "topk", "k": 0.25}),
    "fewer tokens": ("vit", {"strategy": "token_drop", "keep": 0.5, "layers": [0]}),
    "windows": ("swin", {"strategy": "topk", "k": 0.25}),
    "MLP skipped": ("swin", {"strategy": "token_drop", "score": "norm", "keep": 0.25}),
    "blocks skipped": ("swin", {"strategy": "token_drop", "score": "norm", "skip": "window"}),
    "lifted": ("vit_unfused", {"strategy": "topk", "k": 1}),
    "multihead": ("torchvision", {"strategy": "topk", "k": 0.25}),
}


def build(host: str) -> nn.Module:
    if host in zoo.FAMILIES:
        return zoo.build(host)
    sizes = {"image_size": 32, "patch_size": 4, "num_layers": 2, "num_heads": 2}
    return zoo.drawn(lambda: VisionTransformer(**sizes, hidden_dim=32, mlp_dim=64, num_classes=5))


def image(host: str) -> Tensor:
    side = 64 if host == "swin" else 32
    return torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def tokens(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(x)
    return out


@pytest.mark.parametrize("name", LINES)
def test_a_dense_copy_that_is_compiled_first_lends_no_program(name: str) -> None:
    host, line = LINES[name]
    dense, x = build(host), image(host)
    patched = copy.deepcopy(dense)
    sparsiattn.patch(patched, **line)
    expected = {"dense": tokens(dense, x), "patched": tokens(patched, x)}
    for side, model in (("dense", dense), ("patched", patched)):
        compiled: Any = torch.compile(model, backend="eager")
        torch.testing.assert_close(tokens(compiled, x), expected[side], rtol=1e-4, atol=1e-5)
    # or nothing here would tell one from the other
    assert (expected["dense"] - expected["patched"]).abs().max() > 1e-4


def test_nor_does_a_part() -> None:
    dense = zoo.build("vit")
    patched = copy.deepcopy(dense)
    sparsiattn.patch(patched, "topk", k=0.25)
    parts: list[Any] = [model.get_submodule("blocks.0") for model in (dense, patched)]
    x = torch.randn(1, 65, parts[0].norm1.weight.numel())
    expected = [tokens(part, x) for part in parts]
    for part, known in zip(parts, expected, strict=True):
        compiled: Any = torch.compile(part, backend="eager")
        torch.testing.assert_close(tokens(compiled, x), known, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(*expected, atol=1e-3)


@pytest.mark.parametrize("name", LINES)
def test_classes_are_the_hosts_again(name: str) -> None:
    host, line = LINES[name]
    model = build(host)
    before = [type(module) for module in model.modules()]
    patch = sparsiattn.patch(model, **line)
    copied = copy.deepcopy(model)
    patch.unpatch()
    assert [type(module) for module in model.modules()] == before
    sparsiattn.unpatch(copied)
    assert [type(module) for module in copied.modules()] == before
    pickle.loads(pickle.dumps(model))
