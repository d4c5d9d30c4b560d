"""What is patched inside inference mode is patched as outside of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import sparsiattn
from tests.support import zoo

STRATEGIES: dict[str, dict[str, Any]] = {
    "connectivity": {"k": 0.5},
    "token_drop": {"keep": 0.7},
    "token_drop by norm": {"keep": 0.7, "score": "norm"},
    "token_merge": {"r": 2},
    "hybrid": {"k": 0.5, "keep": 0.7},
}


def described(family: str, strategy: str, mode: Any) -> str:
    torch.manual_seed(0)
    model = zoo.build(family)
    images = zoo.images(model)
    try:
        with mode, sparsiattn.patch(model, strategy.split()[0], **STRATEGIES[strategy]) as live:
            out = model(images)
            return f"{live.report()}\n{out.sum().item():.6f}"
    except sparsiattn.SparsiattnError as error:
        return str(error)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("family", ["vit", "swin"])
def test_as_without_it(family: str, strategy: str) -> None:
    inside = described(family, strategy, torch.inference_mode())
    assert inside == described(family, strategy, torch.no_grad())
