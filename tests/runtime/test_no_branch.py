"""Blocks that carry fewer tokens leave no work and no garbage to the host."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparsiattn
from sparsiattn.runtime.no_branch import no_branch
from tests.support import zoo


@pytest.mark.parametrize(
    "add",
    [
        lambda x, y: x + y,
        lambda x, y: y + x,
        torch.add,
        lambda x, y: x.add(y),
        lambda x, y: x.add_(y),
    ],
)
def test_adding_nothing_takes_no_time(add: Callable[[Tensor, Tensor], Tensor]) -> None:
    x = torch.randn(2, 5, 4)
    with torch.no_grad():
        assert add(x, no_branch(x)) is x


@pytest.mark.parametrize(
    "other",
    [
        lambda y: y * torch.full((4,), 2.0),
        lambda y: y.mul_(3.0),
        lambda y: nn.functional.dropout(y, 0.5, training=True),
        lambda y: torch.cat([y, y]),
        lambda y: torch.add(torch.zeros(1), y, alpha=2),
    ],
)
def test_whatever_else_a_host_does_gets_zeros(other: Callable[[Tensor], Any]) -> None:
    x = torch.randn(2, 5, 4)
    with torch.no_grad():
        result = other(no_branch(x))
        assert type(result) is Tensor
        assert not result.any()
        assert not no_branch(x).any()  # nobody wrote to it


def test_a_gradient_gets_a_plain_zero() -> None:
    x = torch.randn(2, 5, 4, requires_grad=True)
    zero = no_branch(x)
    assert type(zero) is Tensor
    assert zero.shape == (1, 1, 1)


@pytest.mark.parametrize(
    "options", [{"strategy": "token_merge", "r": 4}, {"strategy": "token_drop"}]
)
def test_a_pass_leaves_no_cycles_that_hold_activations(options: dict[str, Any]) -> None:
    model = zoo.build("vit")
    x = zoo.images(model)
    with torch.no_grad(), sparsiattn.patch(model, **options):
        model(x)
        gc.collect()
        gc.disable()
        try:
            model(x)
            assert gc.collect() == 0
        finally:
            gc.enable()
