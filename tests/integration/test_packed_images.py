"""Several images in one sequence: every image is planned alone, on its own grid in raster order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import sparsiattn
from sparsiattn import InvalidOption
from sparsiattn.registry.registry import REGISTRY
from tests.support import by_image
from tests.support.by_image import Size, Tower

transformers = pytest.importorskip("transformers")

SIZES: list[list[Size]] = [
    [(1, 8, 8)],
    [(1, 8, 12), (1, 6, 4), (1, 10, 10)],
    [(2, 8, 6), (1, 4, 8)],
]
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


def glm4v() -> nn.Module:
    from transformers.models.glm4v import modeling_glm4v as glm

    config = glm.Glm4vVisionConfig(
        depth=2, hidden_size=32, intermediate_size=64, num_heads=2, patch_size=4, image_size=64,
        out_hidden_size=32,
    )  # fmt: skip
    return drawn(glm.Glm4vVisionModel(config))


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


def test_glm_4v() -> None:
    check(glm4v(), call_of(SIZES[1], 96), LINES[1], by_image.frames_of(SIZES[1], 2) * 2)


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
    with (
        torch.no_grad(),
        by_image.attending(strategy_of(line), by_image.frames_of(sizes, merge) * 2),
    ):
        expected = model(**call)
    model.masked = masked
    with torch.no_grad(), sparsiattn.patch(model, **line, kernel="reference", input=call):
        torch.testing.assert_close(model(**call), expected, rtol=1e-3, atol=1e-4)


def test_tables_of_a_predictor_are_in_raster_order() -> None:
    """They are made for the largest image, so that only images of its size are as by hand."""
    line = {"strategy": "connectivity", "k": 0.25, "scores": "predictor", "tile": (2, 4)}
    sizes: list[Size] = [(1, 6, 10), (2, 6, 10)]
    check(qwen3(), call_of(sizes, 96), line, by_image.frames_of(sizes, 2) * 2)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("line", LINES[:3], ids=str)
def test_clips_attend_over_their_frames(line: dict[str, Any], masked: bool) -> None:
    """A frame is a view, so that no tile spans two of them."""
    sizes: list[Size] = [(3, 6, 4), (1, 8, 8), (2, 4, 4)]
    model, call = drawn(Tower(2, masked=masked, clips=True)), call_of(sizes, 12)
    model.masked = False
    with torch.no_grad(), by_image.attending(strategy_of(line), by_image.clips_of(sizes, 2) * 2):
        expected = model(**call)
    model.masked = masked
    one = alone(call)[0]  # a mask says nothing of which of its two ways a clip goes
    first = {"hidden_states": one["hidden_states"][:24], "grid_thw": torch.tensor([[1, 6, 4]])}
    given = first if masked else call
    with torch.no_grad(), sparsiattn.patch(model, **line, kernel="reference", input=given):
        torch.testing.assert_close(model(**call), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.skipif(
    not hasattr(transformers, "Kimi_K25VisionModel"), reason="transformers before 5.13 has no Kimi"
)
def test_kimi_has_clips_in_raster_order() -> None:
    config = transformers.Kimi_K25VisionConfig(
        patch_size=4, pos_emb_height=8, pos_emb_width=8, num_attention_heads=2,
        num_hidden_layers=2, hidden_size=32, intermediate_size=64,
    )  # fmt: skip
    model = drawn(transformers.Kimi_K25VisionModel(config))
    sizes: list[Size] = [(1, 6, 8), (2, 4, 4)]
    patches = torch.randn(80, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    call = {"pixel_values": patches, "grid_thw": torch.tensor(sizes)}
    line = LINES[1]
    with torch.no_grad():
        with by_image.attending(strategy_of(line), by_image.clips_of(sizes, 1) * 2):
            expected = states(model(**call))
        with sparsiattn.patch(model, **line, kernel="reference", input=call):
            torch.testing.assert_close(states(model(**call)), expected, rtol=1e-3, atol=1e-4)


def test_the_order_is_that_of_the_positions() -> None:
    """PaddleOCR's configuration has a merge size, but its patches are in raster order."""
    sizes = SIZES[1]
    model = drawn(Tower(1, masked=False))
    model.config.spatial_merge_size = 2
    call = call_of(sizes, 12)
    with (
        torch.no_grad(),
        by_image.attending(strategy_of(LINES[0]), by_image.frames_of(sizes, 1) * 2),
    ):
        expected = model(**call)
    with torch.no_grad(), sparsiattn.patch(model, **LINES[0], input=call):
        torch.testing.assert_close(model(**call), expected, rtol=1e-3, atol=1e-4)


LOOKUPS = [by_image.read_at_once, by_image.read_by_embedding, by_image.read_in_pairs]


@pytest.mark.parametrize("merge", [1, 2])
@pytest.mark.parametrize("lookup", LOOKUPS)
def test_positions_may_be_indices_of_a_table(lookup: Any, merge: int) -> None:
    """Which no module takes as an argument."""
    sizes = SIZES[1]
    call = call_of(sizes, 12)
    model = drawn(Tower(merge, masked=False, places=lookup))
    parts = by_image.frames_of(sizes, merge) * 2
    with torch.no_grad(), by_image.attending(strategy_of(LINES[0]), parts):
        expected = model(**call)
    with torch.no_grad(), sparsiattn.patch(model, **LINES[0], input=call):
        torch.testing.assert_close(model(**call), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("lookup", LOOKUPS)
def test_a_table_in_raster_order_may_be_sorted_after_the_lookup(lookup: Any) -> None:
    """So that raster order, which the configuration contradicts, is not confirmed by it."""
    sizes: list[Size] = [(1, 8, 8)]
    squares = by_image.frames_of(sizes, 2)[0].patches
    order = [row * 8 + column for _, row, column in squares]
    raster = torch.tensor(sorted(squares))[:, 1:]
    model = drawn(Tower(2, masked=False, places=lambda _: lookup(raster)[order]))
    expected = by_image.Places()(torch.tensor(squares)[:, 1:])
    torch.testing.assert_close(model.places(None), expected)
    with pytest.raises(InvalidOption, match="not in raster order"):
        sparsiattn.patch(model, "local", input=call_of(sizes, 12))


def test_an_order_that_is_not_confirmed_is_unknown() -> None:
    model = drawn(Tower(3, masked=False))
    model.config.spatial_merge_size = 2
    call = call_of([(1, 6, 6)], 12)
    with pytest.raises(InvalidOption, match="not in raster order"):
        sparsiattn.patch(model, "local", input=call)
    with sparsiattn.patch(model, "topk", input=call) as patch:
        assert not any(site.placed or site.packed for site in patch.sites)


@pytest.mark.parametrize("given", [(1, 8, 8), (1, 4, 4), (2, 12, 8)], ids=str)
@pytest.mark.parametrize("line", [LINES[0], LINES[2]], ids=str)
def test_sizes_are_read_in_every_call(line: dict[str, Any], given: Size) -> None:
    """No matter which images the patch was made with."""
    model, call = qwen3(), call_of(SIZES[1], 96)
    line = {**line, "block": 1}  # else for fewer keys than that
    with torch.no_grad():
        with by_image.attending(strategy_of(line), by_image.frames_of(SIZES[1], 2) * 2):
            expected = states(model(**call))
        with sparsiattn.patch(model, **line, kernel="reference", input=call_of([given], 96)):
            torch.testing.assert_close(states(model(**call)), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flash_attention_2"])
@pytest.mark.parametrize("build", [qwen2, qwen3])
@torch.no_grad()
def test_implementations_of_transformers(build: Any, implementation: str) -> None:
    """Also with the one whose interface takes all images in one call, which needs a GPU."""
    model, call = build(), call_of(SIZES[1], 96)
    with sparsiattn.patch(model, "local", k=0.25, input=call):
        expected = states(model(**call))
    # setting it by its name asks for the package of the kernel
    model.config._attn_implementation_internal = implementation
    with sparsiattn.patch(model, "local", k=0.25, input=call):
        assert torch.equal(states(model(**call)), expected)
    assert model.config._attn_implementation == implementation


@pytest.mark.parametrize("build", [qwen2, qwen3])
def test_checkpoints_recompute_each_image_with_its_size(build: Any) -> None:
    """Two sequences of the same length precede one backward pass."""
    model = build().train()
    calls = [call_of([(1, 8, 12), (1, 4, 4)], 96), call_of([(1, 4, 4), (1, 12, 8)], 96)]

    def gradients() -> list[Tensor]:
        model.zero_grad()
        sum(states(model(**call)).square().mean() for call in calls).backward()  # type: ignore[union-attr]
        return [p.grad for p in model.blocks.parameters() if p.grad is not None]

    with sparsiattn.patch(model, **LINES[1], input=calls[0]):
        expected = [gradient.clone() for gradient in gradients()]
        for block in model.blocks:
            block.gradient_checkpointing = True
            block._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
        for one, other in zip(gradients(), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_what_layers_store_is_kept_image_by_image() -> None:
    sizes: list[Size] = [(1, 8, 8), (1, 8, 8), (1, 4, 8)]
    model, call = qwen3(), call_of(sizes, 96)
    name = next(
        name
        for name in sparsiattn.list_strategies()
        if getattr(REGISTRY.get("strategies", name), "uses_cross_layer_state", False)
        and REGISTRY.get("strategies", name).kind == "attention"
    )
    with sparsiattn.patch(model, name, input=call):
        found = states(model(**call))
        each = torch.cat([states(model(**one)) for one in alone(call)])
        torch.testing.assert_close(found, each, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_report_counts_the_pairs_of_every_image() -> None:
    model, call = qwen3(), call_of(SIZES[1], 96)
    with sparsiattn.patch(model, "topk", k=0.25, tile=1, input=call) as patch:
        pairs = sum(math.prod(size) ** 2 for size in SIZES[1])
        assert [site.macs for site in patch.sites] == [pairs * 32 * 2] * 2
        assert patch.report().macs < patch.report().macs_dense


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"grid_thw": torch.tensor([[1, 8, 8], [1, 8, 4]])}, "96 patches .*got 64"),
    ({"cu_seqlens": torch.tensor([0, 60], dtype=torch.int32)}, r"\[60\] tokens, .* 64 patches"),
    (
        {"cu_seqlens": torch.tensor([0, 24, 64], dtype=torch.int32)},
        r"\[24, 40\] tokens, .* 64 patches",
    ),
]


@pytest.mark.parametrize(("wrong", "message"), WRONG, ids=[message for _, message in WRONG])
@torch.no_grad()
def test_what_does_not_fit_is_refused_with_both_numbers(wrong: Any, message: str) -> None:
    model, call = qwen3(), call_of([(1, 8, 8)], 96)
    with pytest.raises(InvalidOption, match=message):
        sparsiattn.patch(model, "local", input={**call, **wrong})
    with sparsiattn.patch(model, "local", input=call):
        with pytest.raises(InvalidOption, match=message):
            model(**{**call, **wrong})
        states(model(**call))  # and the patch works on


def test_a_grid_for_all_calls_is_refused() -> None:
    with pytest.raises(InvalidOption, match="read in every call"):
        sparsiattn.patch(qwen3(), "local", input=call_of([(1, 8, 8)], 96), grid=(8, 8))


@torch.no_grad()
def test_blocks_that_run_on_their_own_have_no_grid() -> None:
    model, call = qwen3(), call_of([(1, 8, 8)], 96)
    seen: list[Any] = []
    hook = model.blocks[0].register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True
    )
    with sparsiattn.patch(model, "local", input=call):
        model(**call)
        args, kwargs = seen[0]
        with pytest.raises(sparsiattn.ModelChanged, match="positions in the image are not known"):
            model.blocks[0](*args, **kwargs)
    hook.remove()
