"""What ``"auto"`` stands for, and that a line keeps the same keys wherever it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models import VisionTransformer
from torch import Tensor, nn

import sparsiattn
from sparsiattn import AttentionInputs, Site
from sparsiattn.attention import auto_options
from sparsiattn.attention.auto_options import AutoOptions
from sparsiattn.strategies import Connectivity, Hybrid, TopK, finish
from sparsiattn.testing import random_inputs

STRATEGIES = [
    Connectivity(k=0.1),
    Connectivity(k=0.1, tile=(8, 8)),
    Connectivity(k=0.2, tile=(4, 4), background=None),
    Connectivity(k=0.1, tile=(8, 8), scores="predictor"),
    TopK(k=0.1, background="auto"),
    TopK(k=0.1, tile="auto", background="auto"),
]


@pytest.fixture
def model() -> VisionTransformer:
    """1,025 tokens."""
    return VisionTransformer(
        img_size=32, patch_size=1, embed_dim=12, depth=3, num_heads=2, num_classes=3
    ).eval()


@pytest.mark.parametrize(
    ("tokens", "tile"),
    [(1, 1), (197, 1), (1023, 1), (1024, (8, 4)), (2304, (8, 8)), (16385, (8, 8))],
)
def test_tiles_by_the_number_of_tokens(tokens: int, tile: object) -> None:
    for strategy in (Connectivity(), TopK(tile="auto")):
        assert strategy.tile_for(tokens) == tile
    assert TopK().tile_for(tokens) == 1  # exact, and faster than the tiles of an oracle


def test_tiles_stay_when_tokens_are_dropped(model: VisionTransformer) -> None:
    seen: list[AttentionInputs] = []
    strategy = Hybrid(k=0.1, keep=0.3, layers=[0])
    patch = sparsiattn.patch(model, strategy)
    with patch, torch.no_grad():
        assert {row.tile for row in patch.report().sites} == {(8, 4)}
        with patch.observing(lambda site, planner, inputs: seen.append(inputs)):
            model(torch.randn(1, 3, 32, 32))
    assert [inputs.n_queries for inputs in seen] == [1025, 309, 309]
    assert {inputs.tile for inputs in seen} == {(8, 4)}


class Keys(nn.Module):
    """Which keys every query of a call sees."""

    def __init__(self, strategy: Connectivity | TopK, site: Site) -> None:
        super().__init__()
        self.strategy, self.site, self.planner = strategy, site, strategy.planner(site)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        tile = self.strategy.tile_for(q.shape[-2])
        block = self.strategy.block_for(k.shape[-2])
        inputs = AttentionInputs(q, k, v, 0.25, None, self.site, tile=tile, block=block)
        cells = self.strategy.background_for(inputs.key_grid, inputs.key_views)
        return finish(self.planner(inputs), inputs, background=cells).to_mask()


@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
def test_compiled_code_torch_and_exported_programs_keep_the_same_keys(
    strategy: Connectivity | TopK, request: pytest.FixtureRequest
) -> None:
    inputs = random_inputs((16, 16), dim=16)
    operands = (inputs.q, inputs.k, inputs.v)
    keys = Keys(strategy, inputs.site)
    with torch.no_grad():
        by_torch = keys(*operands)
        exported = torch.export.export(keys, operands).module()(*operands)
        request.getfixturevalue("compiled_native")
        by_native = keys(*operands)
    assert 0 < by_torch.float().mean() < 1
    assert torch.equal(by_torch, exported)
    assert torch.equal(by_torch, by_native)


@pytest.mark.parametrize(
    "strategy", [Connectivity(k=0.2), Hybrid(k=0.2, keep=0.5, background=None)]
)
def test_a_saved_patch_keeps_what_auto_meant(
    model: VisionTransformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strategy: Any
) -> None:
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad(), sparsiattn.patch(model, strategy, only_if_faster=False) as patch:
        before = model(x)
        patch.save(tmp_path)
    monkeypatch.setattr(auto_options, "TABLE", (AutoOptions(0, background=4, tile=(4, 4)),))
    with torch.no_grad(), sparsiattn.load(model, tmp_path):
        assert torch.equal(model(x), before)
    with torch.no_grad(), sparsiattn.patch(model, strategy, only_if_faster=False):
        assert not torch.equal(model(x), before)
