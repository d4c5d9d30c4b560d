"""`max_keys`: a limit on the keys of a query, however long the sequence is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparsiattn
from sparsiattn.registry.registry import REGISTRY
from sparsiattn.strategies import Strategy
from sparsiattn.testing.hosts import tiny_vit

MOST = 20
"""Of 65 tokens at 32 pixels, and of 17 at 16."""


def with_budgets() -> list[str]:
    """Every attention strategy that has the option ``k``."""
    kinds = {name: REGISTRY.get("strategies", name) for name in sparsiattn.list_strategies()}
    return [n for n, c in kinds.items() if issubclass(c, Strategy) and "k" in c.option_names()]


@pytest.fixture
def model() -> nn.Module:
    return tiny_vit(dynamic_img_size=True).eval()


def output(model: nn.Module, x: Tensor, strategy: str, **options: Any) -> Tensor:
    options["input"] = torch.zeros(1, 3, 32, 32)
    with torch.no_grad(), sparsiattn.patch(model, strategy, **options):
        return model(x)


@pytest.mark.parametrize("name", with_budgets())
@pytest.mark.parametrize("size", [32, 16])
def test_it_is_a_count_where_the_share_is_more(model: nn.Module, name: str, size: int) -> None:
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    capped = output(model, x, name, k=0.75, max_keys=MOST)
    torch.manual_seed(0)
    expected = output(model, x, name, k=MOST if size == 32 else 0.75)
    torch.testing.assert_close(capped, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", with_budgets())
def test_below_the_share_it_changes_nothing(model: nn.Module, name: str) -> None:
    x = torch.randn(2, 3, 32, 32)
    outputs = []
    for most in (None, 60):
        torch.manual_seed(0)
        outputs.append(output(model, x, name, k=0.5, max_keys=most))
    assert torch.equal(*outputs)


def test_tiles_blocks_and_the_predictor_heed_it(model: nn.Module) -> None:
    x = torch.randn(2, 3, 32, 32)
    for options in ({"tile": (2, 2)}, {"tile": (2, 2), "block": (2, 2), "scores": "predictor"}):
        capped = output(model, x, "connectivity", k=0.75, max_keys=MOST, **options)
        assert torch.equal(capped, output(model, x, "connectivity", k=MOST, **options))


def test_hybrid_passes_it_on(model: nn.Module) -> None:
    x, options = torch.randn(2, 3, 32, 32), {"keep": 0.7, "only_if_faster": False}
    capped = output(model, x, "hybrid", k=0.9, max_keys=8, **options)
    assert torch.equal(capped, output(model, x, "hybrid", k=8, **options))


@pytest.mark.parametrize("most", [0, -1, 2.5, True, "many"])
def test_a_wrong_limit_is_refused(most: object) -> None:
    with pytest.raises(sparsiattn.InvalidOption, match="max_keys must be None or an int >= 1"):
        REGISTRY.get("strategies", "topk")(max_keys=most)


def test_a_strategy_without_k_has_nothing_to_limit(model: nn.Module) -> None:
    with pytest.raises(sparsiattn.InvalidOption, match="'dense' has no option k"):
        sparsiattn.patch(model, "dense", max_keys=4)


@dataclass(frozen=True)
class Masking(Strategy):
    name = "masking"
    k: float = 0.5

    def plan(self, inputs: sparsiattn.AttentionInputs) -> sparsiattn.Pattern:
        return sparsiattn.Pattern.mask(torch.ones(1, 1, inputs.n_queries, inputs.n_keys).bool())


def test_a_mask_cannot_be_limited(model: nn.Module) -> None:
    with pytest.raises(sparsiattn.InvalidOption, match="max_keys=4 needs a strategy that ranks"):
        output(model, torch.randn(1, 3, 32, 32), Masking(max_keys=4))  # type: ignore[arg-type]
