"""Passes that another thread takes the patch from, and passes that an interrupt ends."""

from __future__ import annotations

import contextlib
import gc
import threading
import weakref
from functools import partial
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


def request(host: nn.Module, batch: Tensor, method: str = "__call__") -> None:
    getattr(host, method)(batch)


def failing(module: nn.Module, error: type[BaseException]) -> Any:
    def fail(module: nn.Module, args: Any) -> None:
        raise error

    return module.register_forward_pre_hook(fail)


def in_thread(action: Any) -> None:
    def run() -> None:
        with contextlib.suppress(BaseException):
            action()

    worker = threading.Thread(target=run)
    worker.start()
    worker.join()


@pytest.mark.parametrize(
    ("method", "undone"), [("__call__", True), ("__call__", False), ("forward_features", False)]
)
@pytest.mark.parametrize(
    ("error", "place"),
    [
        (RuntimeError, "blocks.2.attn.qkv"),
        (KeyboardInterrupt, "blocks.2.attn.qkv"),
        (Timeout, "blocks.2.mlp.fc2"),
        (Timeout, "blocks.2.norm1"),
    ],
)
@pytest.mark.parametrize(("strategy", "options"), STRATEGIES)
def test_what_an_interrupt_leaves_is_freed(
    strategy: str,
    options: dict[str, Any],
    error: type[BaseException],
    place: str,
    method: str,
    undone: bool,
) -> None:
    model, batch = vit(), torch.randn(8, 3, 32, 32)
    patch, states = sparsiattn.patch(model, strategy, **options), []
    model.blocks[0].register_forward_hook(lambda _, args, out: states.append(weakref.ref(out)))
    failing(model.get_submodule(place), error)
    with pytest.raises(error):
        request(model, batch, method)
    in_thread(partial(request, model, batch, method))
    gone = [weakref.ref(model), weakref.ref(batch), *states]
    assert len(gone) == 4
    if undone:
        patch.unpatch()
    del model, patch, batch
    gc.collect()
    assert [known() for known in gone] == [None] * 4


@pytest.mark.parametrize(("strategy", "options"), STRATEGIES)
def test_an_interrupted_thread_leaves_no_hook(strategy: str, options: dict[str, Any]) -> None:
    model, x = vit(), torch.randn(2, 3, 32, 32)
    patch = sparsiattn.patch(model, strategy, **options)
    handle = failing(model.blocks[1].attn.proj, Timeout)
    in_thread(partial(request, model, x))
    handle.remove()
    patch.unpatch()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@torch.no_grad()
@pytest.mark.parametrize("place", ["blocks.3.attn.qkv", "blocks.1.mlp.fc2"])
@pytest.mark.parametrize(("strategy", "options"), STRATEGIES)
def test_an_interrupt_whose_traceback_is_kept_does_no_harm(
    strategy: str, options: dict[str, Any], place: str
) -> None:
    model, plain, x = vit(), vit(), torch.randn(2, 3, 32, 32)
    dense, tracebacks = plain(x), []

    def interrupt() -> None:
        handle = failing(model.get_submodule(place), Timeout)
        with pytest.raises(Timeout) as kept:
            model(x)
        handle.remove()
        tracebacks.append(kept)

    def drop(*_: Any) -> None:
        tracebacks.clear()
        gc.collect()

    def by_hand(before_the_third: Any) -> Tensor:
        tokens = model._pos_embed(model.patch_embed(x))
        for index, block in enumerate(model.blocks):
            if index == 2:
                before_the_third()
            tokens = block(tokens)
        return tokens

    with sparsiattn.patch(model, strategy, **options):
        sparse, tokens = model(x), by_hand(drop)
        interrupt()
        assert torch.equal(plain(x), dense)
        assert torch.equal(model(x), sparse)
        interrupt()
        assert torch.equal(by_hand(drop), tokens)
        interrupt()
        with model.blocks[2].register_forward_pre_hook(drop):
            assert torch.equal(model(x), sparse)
    assert torch.equal(model(x), dense)
