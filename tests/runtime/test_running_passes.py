"""Passes that another thread takes the patch from, and passes that an interrupt ends."""

from __future__ import annotations

import gc
import threading
import weakref
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import sparsiattn

STRATEGIES: list[tuple[str, dict[str, Any]]] = [
    ("topk", {"k": 0.25}),
    ("token_drop", {"keep": 0.5}),
]
PLACES = [
    "blocks.0",
    "blocks.1.norm1",
    "blocks.1.attn.qkv",
    "blocks.1.drop_path2",
    "blocks.2",
    "norm",
]


def vit() -> Any:
    torch.manual_seed(0)
    model = VisionTransformer(
        img_size=32, patch_size=4, embed_dim=48, depth=4, num_heads=3, num_classes=5
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return model.eval()


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("strategy", "options"), STRATEGIES)
def test_a_pass_without_its_patch_is_whole_or_an_error(
    strategy: str, options: dict[str, Any], place: str
) -> None:
    model, x = vit(), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        dense = model(x)
        with sparsiattn.patch(model, strategy, **options):
            sparse = model(x)
    patch = sparsiattn.patch(model, strategy, **options)
    arrived, undone, answers = threading.Event(), threading.Event(), []

    def wait(*_: Any) -> None:
        arrived.set()
        undone.wait(30)

    handle = model.get_submodule(place).register_forward_pre_hook(wait)

    def serve() -> None:
        with torch.no_grad():
            try:
                answers.append(model(x))
            except Exception as error:
                answers.append(error)

    thread = threading.Thread(target=serve)
    thread.start()
    arrived.wait(30)
    patch.unpatch()
    handle.remove()
    undone.set()
    thread.join(30)
    (answer,) = answers
    if isinstance(answer, Tensor):
        assert any(torch.allclose(answer, known, atol=1e-5) for known in (dense, sparse))
    with torch.no_grad():  # and the model is as it was
        assert torch.equal(model(x), dense)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


class Timeout(BaseException):
    """As workers of web servers raise it."""


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, Timeout])
@pytest.mark.parametrize(("strategy", "options"), STRATEGIES)
def test_what_an_interrupt_leaves_is_freed(
    strategy: str, options: dict[str, Any], error: type[BaseException]
) -> None:
    model, batches = vit(), []
    patch = sparsiattn.patch(model, strategy, **options)

    def fail(module: nn.Module, args: Any) -> None:
        raise error

    def request(host: nn.Module, batch: Tensor) -> None:
        batches.append(weakref.ref(batch))
        host(batch)

    model.blocks[2].attn.qkv.register_forward_pre_hook(fail)
    with pytest.raises(error):
        request(model, torch.randn(8, 3, 32, 32))
    patch.unpatch()
    alive = weakref.ref(model)
    del model, patch
    gc.collect()
    assert (alive(), batches[0]()) == (None, None)
