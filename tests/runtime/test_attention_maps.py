"""Who records the attention weights of a host that writes its softmax gets those that are used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparsiattn
from sparsiattn import ModelChanged
from tests.support.strongest_keys import SIZE, Blocks, photos, strongest


class Handwritten(nn.Module):
    num_heads = 3

    def __init__(self, drop: float = 0.0) -> None:
        super().__init__()
        self.qkv, self.softmax = nn.Linear(48, 144), nn.Softmax(-1)
        self.attn_drop = nn.Dropout(drop)
        self.kept: Any = None

    def operands(self, x: Tensor) -> Tensor:
        return self.qkv(x).view(*x.shape[:2], 3, 3, 16).permute(2, 0, 3, 1, 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.operands(x)
        self.kept = self.softmax(q @ k.mT * 0.25)
        return (self.attn_drop(self.kept) @ v).transpose(1, 2).reshape(x.shape)


def model(drop: float = 0.0) -> Any:
    torch.manual_seed(0)
    return Blocks(Handwritten(drop)).eval()


def expected_weights(host: Any, x: Tensor) -> Tensor:
    q, k, _ = host.blocks[0].operands(host.patch_embed(x).flatten(2).mT)
    scores = q @ k.mT * 0.25
    return scores.masked_fill(~strongest(scores, 0.25), float("-inf")).softmax(-1)


def after(part: nn.Module, note: Callable[[Any], None]) -> Any:
    return part.register_forward_hook(lambda module, args, output: note(output))


def before(part: nn.Module, note: Callable[[Any], None]) -> Any:
    return part.register_forward_pre_hook(lambda module, args: note(args[0]))


def everywhere(part: nn.Module, note: Callable[[Any], None]) -> Any:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        if module is part:
            note(output)

    return nn.modules.module.register_module_forward_hook(hook)


@pytest.mark.parametrize(
    ("part", "listen"),
    [("attn_drop", after), ("attn_drop", before), ("attn_drop", everywhere), ("softmax", after)],
)
@pytest.mark.parametrize("registered", ["before the patch", "after it"])
@torch.no_grad()
def test_hooks_see_what_is_used(part: str, listen: Any, registered: str) -> None:
    host, x, maps = model(), photos(), []
    listened = getattr(host.blocks[0], part)
    if registered == "before the patch":
        handle = listen(listened, maps.append)
    with sparsiattn.patch(host, "topk", k=0.25, input=SIZE):
        assert not maps
        if registered != "before the patch":
            handle = listen(listened, maps.append)
        output = host(x)
        handle.remove()
        torch.testing.assert_close(output, host(x))
    assert type(maps[0]) is Tensor
    assert float((maps[0] > 0).float().mean()) == 0.25
    torch.testing.assert_close(maps[0], expected_weights(host, x))


@torch.no_grad()
def test_a_hook_may_change_them() -> None:
    host, x = model(), photos()
    with sparsiattn.patch(host, "topk", k=0.25, input=SIZE):
        plain = host.blocks[0](host.patch_embed(x).flatten(2).mT)
        handle = host.blocks[0].attn_drop.register_forward_hook(lambda m, a, weights: weights * 2)
        doubled = host.blocks[0](host.patch_embed(x).flatten(2).mT)
        handle.remove()
    torch.testing.assert_close(doubled, plain * 2)


def test_dropout_in_training_is_part_of_what_they_see() -> None:
    host, maps = model(drop=0.5).train(), []
    with sparsiattn.patch(host, "topk", k=0.25, input=SIZE):
        handle = after(host.blocks[0].attn_drop, maps.append)
        host(photos()).sum().backward()
        handle.remove()
    assert 0.1 < float((maps[0] > 0).float().mean()) < 0.15
    assert host.blocks[0].qkv.weight.grad is not None


@torch.no_grad()
def test_disabled_they_are_dense() -> None:
    host, maps = model(), []
    with sparsiattn.patch(host, "topk", k=0.25, input=SIZE) as patch:
        handle = after(host.blocks[0].attn_drop, maps.append)
        with patch.disabled():
            host(photos())
        handle.remove()
    assert bool((maps[0] > 0).all())


@torch.no_grad()
def test_weights_that_a_host_keeps_are_not_made_up_later() -> None:
    host = model()
    with sparsiattn.patch(host, "topk", k=0.25, input=SIZE):
        host(photos())
        with pytest.raises(ModelChanged, match=r"read after it returned.*forward hook"):
            host.blocks[0].kept * 1.0


def test_nothing_is_left_behind() -> None:
    host = model()
    sparsiattn.patch(host, "topk", k=0.25, input=SIZE).unpatch()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in host.modules())
