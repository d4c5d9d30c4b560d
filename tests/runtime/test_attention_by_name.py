"""Hosts that took torch's attention function before this library stood in front of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.functional import scaled_dot_product_attention as by_name

import sparsiattn
from tests.support.strongest_keys import SIZE, Blocks, TokenAttention, photos, strongest_keys


def usual(host: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def imported(host: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return by_name(q, k, v)


def keywords(host: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return by_name(query=q, key=k, value=v, scale=0.25)


def operator(host: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.ops.aten.scaled_dot_product_attention(q, k, v)


def overload(host: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.ops.aten.scaled_dot_product_attention.default(q, k, v)


BY_NAME = [imported, keywords, operator, overload]


def twins(attend: Callable[..., Tensor]) -> tuple[Blocks, Blocks]:
    """A model whose second block takes attention that way, and one like it that does not."""
    model = Blocks(TokenAttention(usual), TokenAttention(attend)).eval()
    plain = Blocks(TokenAttention(usual), TokenAttention(usual)).eval()
    plain.load_state_dict(model.state_dict())
    return model, plain


@pytest.mark.parametrize("attend", BY_NAME)
@torch.no_grad()
def test_they_are_patched_like_the_others(attend: Callable[..., Tensor]) -> None:
    model, plain = twins(attend)
    x = photos()
    dense = model(x)
    with strongest_keys(0.25):
        expected = plain(x)
    with sparsiattn.patch(model, "topk", k=0.25, input=SIZE) as patch:
        assert [site.name for site in patch.sites] == ["blocks.0", "blocks.1"]
        torch.testing.assert_close(model(x), expected)
        assert not torch.allclose(model(x), dense, atol=1e-3)
        with patch.disabled():
            assert torch.equal(model(x), dense)
    assert torch.equal(model(x), dense)


@pytest.mark.parametrize("attend", [imported, operator])
@torch.no_grad()
def test_compiled(attend: Callable[..., Tensor]) -> None:
    model, _ = twins(attend)
    torch.compiler.reset()
    with sparsiattn.patch(model, "topk", k=0.25, input=SIZE):
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(photos()), model(photos()))


def test_gradients() -> None:
    model, plain = twins(imported)
    gradients = []
    for host in (model, plain):
        with sparsiattn.patch(host, "topk", k=0.25, input=SIZE):
            host(photos()).square().sum().backward()
        gradients.append(host.blocks[1].qkv.weight.grad)
    torch.testing.assert_close(*gradients)


def test_the_function_itself_stays_torchs_own() -> None:
    model, _ = twins(imported)
    q = torch.randn(1, 2, 5, 4)
    with sparsiattn.patch(model, "topk", k=0.25, input=SIZE):
        assert torch.equal(by_name(q, q, q), F.scaled_dot_product_attention(q, q, q))
