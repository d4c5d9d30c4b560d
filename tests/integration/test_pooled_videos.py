"""Videos whose keys are pooled: queries and keys have different grids in every frame."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import sparsiattn
from sparsiattn.registry.registry import REGISTRY
from sparsiattn.strategies import Strategy

video = pytest.importorskip("torchvision.models.video.mvit")
SHAPE = (1, 3, 4, 32, 32)
TILES: list[int | tuple[int, int]] = [1, (4, 4), (6, 4), (8, 3)]


def mvit() -> nn.Module:
    """Two blocks over 2 frames of 8 x 8 patches, with keys of 4 x 4."""
    block = video.MSBlockConfig(
        num_heads=2, input_channels=16, output_channels=16, kernel_q=[], kernel_kv=[1, 3, 3],
        stride_q=[], stride_kv=[1, 2, 2],
    )  # fmt: skip
    torch.manual_seed(0)
    options = {"residual_pool": True, "residual_with_cls_embed": False, "rel_pos_embed": True}
    model: nn.Module = video.MViT(
        (32, 32), 4, [block, block], proj_after_attn=True, num_classes=5, **options
    )
    return model.eval()


def attention_strategies() -> list[str]:
    kinds = REGISTRY.all("strategies")
    return [name for name, kind in kinds.items() if issubclass(kind, Strategy)]


@pytest.mark.parametrize("name", attention_strategies())
def test_rows_of_patterns_are_those_of_the_tiles(name: str) -> None:
    """Every strategy computes, or refuses the model by name."""
    model, x = mvit(), torch.randn(SHAPE)
    for tile in TILES:
        refused = ""
        try:
            with sparsiattn.patch(model, name, tile=tile, input=SHAPE), torch.no_grad():
                assert torch.isfinite(model(x)).all()
        except sparsiattn.SparsiattnError as error:
            refused = str(error)
        assert not refused or repr(name) in refused


@pytest.mark.parametrize("tile", TILES)
def test_local_keeps_keys_and_all_of_them_is_the_model(tile: int | tuple[int, int]) -> None:
    model, x = mvit(), torch.randn(SHAPE)
    with torch.no_grad():
        dense = model(x)
        with sparsiattn.patch(model, "local", k=0.25, tile=tile, input=SHAPE) as patch:
            assert patch.sites[0].key_grid != patch.sites[0].grid
            assert not torch.allclose(model(x), dense, atol=1e-5)
        with sparsiattn.patch(model, "local", k=1.0, tile=tile, input=SHAPE):
            torch.testing.assert_close(model(x), dense)
