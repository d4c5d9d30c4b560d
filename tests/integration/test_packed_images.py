"""Several images in one sequence: every image is planned alone, on its own grid in raster order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparsiattn
from sparsiattn import InvalidOption
from sparsiattn.registry.registry import REGISTRY
from tests.support import by_image
from tests.support.by_image import Size, Tower

transformers = pytest.importorskip("transformers")

SIZES: list[list[Size]] = [[(1, 8, 8)], [(1, 8, 12), (1, 6, 4), (1, 10, 10)], [(2, 8, 6), (1, 4, 8)]]
LINES: list[dict[str, Any]] = [
    {"strategy": "local", "k": 0.25, "tile": 1, "background": None},
    {"strategy": "local", "k": 0.3, "tile": (4, 4), "block": (2, 2), "background": 2},
    {"strategy": "connectivity", "k": 0.25, "tile": (4, 4), "block": (2, 2), "background": 2},
    {"strategy": "topk", "k": 0.25, "tile": 1},
]
"""What depends on places, and `topk`, which does not."""


def strategy_of(line: dict[str, Any]) -> Any:
    options = {name: value for name, value in line.items() if name != "strategy"}
    return REGISTRY.get("strategies", line["strategy"])(**options)


def call_of(sizes: Sequence[Size], width: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    patches = torch.randn(sum(map(math.prod, sizes)), width, generator=generator)
    return {"hidden_states": patches, "grid_thw": torch.tensor(sizes)}


def alone(call: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """The calls of each image on its own."""
    sizes = call["grid_thw"]
    parts = call["hidden_states"].split(sizes.prod(1).tolist())
    return [
        {"hidden_states": part, "grid_thw": size[None]}
        for part, size in zip(parts, sizes, strict=True)
    ]


def states(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.last_hidden_state


def drawn(model: nn.Module) -> nn.Module:
    """Weights that make attention matter."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                scale = 1.5 / math.sqrt(parameter.shape[-1])
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return model.eval()


def qwen2(depth: int = 3) -> nn.Module:
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen

    config = qwen.Qwen2_5_VLVisionConfig(
        depth=depth, hidden_size=32, intermediate_size=64, num_heads=2, patch_size=4,
        window_size=16, out_hidden_size=32, fullatt_block_indexes=[1],
    )  # fmt: skip
    return drawn(qwen.Qwen2_5_VisionTransformerPretrainedModel(config))


def qwen3() -> nn.Module:
    from transformers.models.qwen3_vl import modeling_qwen3_vl as qwen

    config = qwen.Qwen3VLVisionConfig(
        depth=2, hidden_size=32, intermediate_size=64, num_heads=2, patch_size=4,
        out_hidden_size=32, deepstack_visual_indexes=[1], num_position_embeddings=64,
    )  # fmt: skip
    return drawn(qwen.Qwen3VLVisionModel(config))


def check(
    model: nn.Module, call: dict[str, Tensor], line: dict[str, Any], parts: list[by_image.Part]
) -> None:
    """The result is that of the parts by hand, and that of every image alone."""
    with torch.no_grad():
        dense = states(model(**call))
        with by_image.attending(strategy_of(line), parts) as left:
            expected = states(model(**call))
        assert not left
        assert not torch.allclose(expected, dense, atol=1e-3)
        with sparsiattn.patch(model, **line, kernel="reference", input=call) as patch:
            assert all(site.placed and site.packed for site in patch.sites)
            found = states(model(**call))
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
            each = torch.cat([states(model(**one)) for one in alone(call)])
            torch.testing.assert_close(found, each, rtol=1e-4, atol=1e-5)
        assert torch.equal(states(model(**call)), dense)


@pytest.mark.parametrize("line", LINES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_qwen3_vl(sizes: list[Size], line: dict[str, Any]) -> None:
    check(qwen3(), call_of(sizes, 96), line, by_image.frames_of(sizes, 2) * 2)


@pytest.mark.parametrize("line", LINES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_qwen2_5_vl_in_windows(sizes: list[Size], line: dict[str, Any]) -> None:
    """Its full layers have the patches window by window, too."""
    windows = by_image.windows_of(sizes, 2, 4)
    parts = windows + by_image.frames_of(sizes, 2, 4) + windows
    check(qwen2(), call_of(sizes, 96), line, parts)


@pytest.mark.parametrize("masked", [False, True], ids=["a call each", "one call and a mask"])
@pytest.mark.parametrize("merge", [1, 2])
@pytest.mark.parametrize("line", LINES, ids=str)
def test_an_unknown_tower(line: dict[str, Any], merge: int, masked: bool) -> None:
    sizes = SIZES[1]
    model = drawn(Tower(merge, masked=masked))
    call = call_of(sizes, 12)
    # by hand, each image has a call of its own
    model.masked = False
    with torch.no_grad(), by_image.attending(strategy_of(line), by_image.frames_of(sizes, merge) * 2):
        expected = model(**call)
    model.masked = masked
    with torch.no_grad(), sparsiattn.patch(model, **line, kernel="reference", input=call):
        torch.testing.assert_close(model(**call), expected, rtol=1e-3, atol=1e-4)


def test_tables_of_a_predictor_are_in_raster_order() -> None:
    """They are made for the largest image, so that only images of its size are as by hand."""
    line = {"strategy": "connectivity", "k": 0.25, "scores": "predictor", "tile": (2, 4)}
    sizes: list[Size] = [(1, 6, 10), (2, 6, 10)]
    check(qwen3(), call_of(sizes, 96), line, by_image.frames_of(sizes, 2) * 2)
