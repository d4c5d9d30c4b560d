"""Images with sizes of their own in the padded rows of a batch, each planned on its own grid."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparsiattn
from sparsiattn import InvalidOption
from sparsiattn.attention.packing import sizes_of_rows
from sparsiattn.registry.registry import REGISTRY
from tests.support import by_image

transformers = pytest.importorskip("transformers")

SIZES = [(4, 9), (9, 4), (6, 6), (3, 8)]
"""Rows and columns; the first three have as many patches."""
LINES: list[dict[str, Any]] = [
    {"strategy": "local", "k": 0.25, "tile": 1, "background": None},
    {"strategy": "connectivity", "k": 0.3, "tile": (3, 2), "block": (1, 2), "background": 2},
    {"strategy": "topk", "k": 0.25, "tile": 1},
]


def drawn(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data.copy_(noise / parameter.shape[-1] ** 0.5 * 1.5)
    return model.eval()


def siglip2() -> nn.Module:
    config = transformers.Siglip2VisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        patch_size=4, num_patches=64, vision_use_head=False,
    )  # fmt: skip
    return drawn(transformers.Siglip2VisionModel(config))


def gemma4() -> nn.Module:
    config = transformers.Gemma4VisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=16, patch_size=4, position_embedding_size=64,
        pooling_kernel_size=1,
    )  # fmt: skip
    return drawn(transformers.Gemma4VisionModel(config))


def patches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(rows * columns, 48, generator=generator) for rows, columns in SIZES]


def naflex(which: list[int], length: int | None = None) -> dict[str, Tensor]:
    """Rows of some images, padded to one length."""
    rows = [patches()[i] for i in which]
    length = length or max(map(len, rows))
    values, mask = torch.full((len(rows), length, 48), 7.0), torch.zeros(len(rows), length)
    for i, row in enumerate(rows):
        values[i, : len(row)], mask[i, : len(row)] = row, 1
    shapes = torch.tensor([SIZES[i] for i in which])
    return {"pixel_values": values, "pixel_attention_mask": mask, "spatial_shapes": shapes}


def placed(which: list[int], length: int | None = None) -> dict[str, Tensor]:
    """The same with column and row of every patch."""
    values = naflex(which, length)["pixel_values"]
    places = torch.full((*values.shape[:2], 2), -1)
    for i, image in enumerate(which):
        rows, columns = SIZES[image]
        at = [(column, row) for row in range(rows) for column in range(columns)]
        places[i, : rows * columns] = torch.tensor(at)
    return {"pixel_values": values, "pixel_position_ids": places}


def own_rows(model: nn.Module, call: dict[str, Tensor], which: list[int]) -> list[Tensor]:
    """The result of each image in the last layer."""
    seen: list[Tensor] = []
    parts = dict(model.named_modules())
    # older versions of transformers have that of SigLIP 2 one level deeper
    encoder = next(part for path, part in parts.items() if path.split(".")[-1] == "encoder")
    hook = encoder.register_forward_hook(lambda *a: seen.append(a[-1].last_hidden_state))
    with torch.no_grad():
        model(**call)
    hook.remove()
    counts = [SIZES[i][0] * SIZES[i][1] for i in which]
    return [row[:count] for row, count in zip(seen[0], counts, strict=True)]


def by_hand(model: nn.Module, call: Any, line: dict[str, Any], image: int, heads: int) -> Tensor:
    options = {name: value for name, value in line.items() if name != "strategy"}
    strategy = REGISTRY.get("strategies", line["strategy"])(**options)
    part = by_image.frames_of([(1, *SIZES[image])], 1)
    one = call([image])
    with by_image.attending(strategy, part * heads):
        return own_rows(model, one, [image])[0]


needs_gemma = pytest.mark.skipif(
    not hasattr(transformers, "Gemma4VisionModel"), reason="transformers before 5.5 has no Gemma 4"
)
HOSTS: dict[str, tuple[Any, Any]] = {"siglip2": (siglip2, naflex), "gemma4": (gemma4, placed)}


@pytest.mark.parametrize("line", LINES, ids=str)
@pytest.mark.parametrize("name", ["siglip2", pytest.param("gemma4", marks=needs_gemma)])
def test_every_image_has_its_own_grid(name: str, line: dict[str, Any]) -> None:
    build, call = HOSTS[name]
    model, which = build(), [0, 1, 2, 3]
    expected = [by_hand(model, call, line, i, 2) for i in which]
    with sparsiattn.patch(model, **line, kernel="reference", input=call([3])):
        for given in (call(which), call(which, 40)):
            found = own_rows(model, given, which)
            for one, other in zip(found, expected, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
        alone = [own_rows(model, call([i]), [i])[0] for i in which]
        torch.testing.assert_close(alone, expected, rtol=1e-3, atol=1e-4)


@needs_gemma
def test_gemma_is_not_given_a_square_grid() -> None:
    """Its patches tell their places; 36 patches are not 6 x 6."""
    with sparsiattn.patch(gemma4(), "local", input=placed([0])) as patch:
        assert [site.grid for site in patch.sites] == [(4, 9)] * 2


@needs_gemma
@torch.no_grad()
def test_patches_in_another_order_have_no_grid() -> None:
    model, call = gemma4(), placed([0])
    order = torch.randperm(36, generator=torch.Generator().manual_seed(2))
    mixed = {name: value[:, order] for name, value in call.items()}
    assert sizes_of_rows(mixed["pixel_position_ids"]) is None
    with pytest.raises(InvalidOption, match="not in raster order"):
        sparsiattn.patch(model, "local", input=mixed)
    unknown = pytest.raises(sparsiattn.ModelChanged, match="are not known")
    with sparsiattn.patch(model, "local", input=call), unknown:
        model(**mixed)


@torch.no_grad()
def test_sizes_that_do_not_fit_their_rows() -> None:
    """As without them: keys are chosen one by one, and places are asked for in vain."""
    model, call = siglip2(), naflex([0])
    wrong = {**call, "spatial_shapes": torch.tensor([[4, 8]])}
    unknown = pytest.raises(sparsiattn.ModelChanged, match="36 tokens")
    with sparsiattn.patch(model, "local", input=call), unknown:
        model(**wrong)


@torch.no_grad()
def test_tokens_are_dropped_without_a_grid() -> None:
    model, call = siglip2(), naflex([0, 3])
    with sparsiattn.patch(model, "token_drop", keep=0.5, input=naflex([0])):
        found = own_rows(model, call, [0, 3])
        torch.testing.assert_close(found[1], own_rows(model, naflex([3]), [3])[0])
    with pytest.raises(InvalidOption, match="a grid of their own in every image"):
        sparsiattn.patch(model, "expedit", input=naflex([0]))
