"""Parts of a model that are compiled, traced or scripted by themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparsiattn
from sparsiattn.testing import tiny_images, tiny_vit


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch.compiler.reset()


def compile_parts(model: Any, how: str) -> None:
    for i, block in enumerate(model.blocks):
        if how == "attn.compile()":
            block.attn.compile(backend="eager")
        elif how == "torch.compile(attn)":
            block.attn = torch.compile(block.attn, backend="eager")
        elif how == "block.compile()":
            block.compile(backend="eager")
        else:
            model.blocks[i] = torch.compile(block, backend="eager")


def answers(strategy: str, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Of an uncompiled model: without the patch, and with it."""
    model, x = tiny_vit(), tiny_images(2)
    dense = model(x)
    sparsiattn.patch(model, strategy, **options)
    return dense, model(x)


@torch.no_grad()
@pytest.mark.parametrize("patched", ["first", "afterwards"])
@pytest.mark.parametrize(
    "how", ["attn.compile()", "torch.compile(attn)", "block.compile()", "torch.compile(block)"]
)
def test_the_patch_takes_effect_in_compiled_parts(how: str, patched: str) -> None:
    dense, right = answers("topk", {"k": 0.2})
    assert (dense - right).abs().max() > 1e-3
    model: Any = tiny_vit()
    if patched == "first":
        sparsiattn.patch(model, "topk", k=0.2)
    compile_parts(model, how)
    if patched == "afterwards":
        sparsiattn.patch(model, "topk", k=0.2)
    elif how.startswith("torch"):  # other modules stand in the place of those that were patched
        with pytest.raises(sparsiattn.SparsiattnError, match="patch the changed model again"):
            model(tiny_images(2))
        return
    torch.testing.assert_close(model(tiny_images(2)), right, rtol=1e-3, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(
    ("strategy", "options"), [("token_drop", {"keep": 0.5}), ("token_merge", {"r": 3})]
)
@pytest.mark.parametrize("how", ["attn.compile()", "block.compile()"])
def test_tokens_with_compiled_parts(strategy: str, options: dict[str, Any], how: str) -> None:
    """What a block hands on would be lost between compiled parts."""
    model: nn.Module = tiny_vit()
    sparsiattn.patch(model, strategy, **options)
    compile_parts(model, how)
    with pytest.raises(sparsiattn.SparsiattnError, match=r"torch\.compile\(model\)"):
        model(tiny_images(2))


@torch.no_grad()
def test_tokens_scored_without_attention_with_compiled_attention() -> None:
    options = {"keep": 0.5, "score": "norm"}
    dense, right = answers("token_drop", options)
    assert (dense - right).abs().max() > 1e-3
    model: nn.Module = tiny_vit()
    sparsiattn.patch(model, "token_drop", **options)
    compile_parts(model, "attn.compile()")
    torch.testing.assert_close(model(tiny_images(2)), right, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_attention_that_is_reused_with_compiled_parts() -> None:
    """What one site leaves for the next would be lost between compiled parts."""
    model: nn.Module = tiny_vit()
    sparsiattn.patch(model, "attention_reuse")
    compile_parts(model, "attn.compile()")
    with pytest.raises(sparsiattn.SparsiattnError, match=r"'attention_reuse'.*compile the whole"):
        model(tiny_images(2))


@torch.no_grad()
@pytest.mark.filterwarnings(
    "ignore::torch.jit.TracerWarning", "ignore:.*torch.jit:DeprecationWarning"
)
@pytest.mark.parametrize(
    ("strategy", "options"),
    [
        ("token_drop", {"keep": 0.5}),
        ("hybrid", {"k": 0.25, "keep": 0.5}),
        ("topk", {"k": 0.25}),
    ],
)
@pytest.mark.parametrize("images", [1, 2])
def test_a_trace_serves_other_batches(strategy: str, options: dict[str, Any], images: int) -> None:
    model = tiny_vit()
    sparsiattn.patch(model, strategy, **options)
    traced = torch.jit.trace(model, tiny_images(images), check_trace=False)
    x = tiny_images(4)
    torch.testing.assert_close(traced(x), model(x), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("strategy", ["topk", "connectivity", "token_drop"])
def test_scripting_is_refused_with_the_way_out(strategy: str) -> None:
    model = tiny_vit()
    refused = pytest.raises(sparsiattn.SparsiattnError, match=r"sparsiattn\.export")
    with sparsiattn.patch(model, strategy), refused:  # torch.jit keeps the model
        torch.jit.script(model)
