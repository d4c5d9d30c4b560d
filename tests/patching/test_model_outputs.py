"""What is compared of a model's outputs: which tensors, along which axis, and who says so."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import sparsiattn
from sparsiattn.errors import DataError, InvalidOption, InvalidType
from sparsiattn.patching import OutputMetric
from sparsiattn.patching.model_outputs import (
    channel_axis,
    cosine,
    has_classes,
    is_headless,
    main_tensors,
    same_choice,
    says_headless,
)
from sparsiattn.testing.hosts import tiny_images, tiny_vit

NOTHING = nn.Module()
FEATURES, CLASSES = OutputMetric("features"), OutputMetric("classes")


def angle_cosine(one: list[float], other: list[float]) -> float:
    """By Python's own numbers, one pair of vectors."""
    dot = math.fsum(a * b for a, b in zip(one, other, strict=True))
    return dot / math.hypot(*one) / math.hypot(*other)


def mean_cosine(one: Tensor, other: Tensor) -> list[float]:
    """Of ``[B, ..., D]``, by loops over all positions."""
    images = zip(one.flatten(1, -2), other.flatten(1, -2), strict=True)
    return [
        math.fsum(angle_cosine(a.tolist(), b.tolist()) for a, b in zip(x, y, strict=True)) / len(x)
        for x, y in images
    ]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- which metric fits ---------------------------------------------------------------------------


def small_config(kind: Any, **options: Any) -> Any:
    return kind(
        image_size=32, patch_size=8, hidden_size=48, num_hidden_layers=1, num_attention_heads=3,
        intermediate_size=96, **options,
    )  # fmt: skip


def transformers_model(name: str) -> Any:
    transformers = pytest.importorskip("transformers")
    if name == "segformer":
        config = transformers.SegformerConfig(
            num_labels=7, hidden_sizes=[8, 8, 16, 16], depths=[1] * 4, decoder_hidden_size=16,
            num_attention_heads=[1, 1, 2, 2],
        )  # fmt: skip
        return transformers.SegformerForSemanticSegmentation(config).eval()
    if name == "classifier":
        return transformers.ViTForImageClassification(
            small_config(transformers.ViTConfig, num_labels=5)
        ).eval()
    if name == "headless":
        return transformers.ViTModel(small_config(transformers.ViTConfig)).eval()
    if name == "backbone":
        config = small_config(transformers.Dinov2Config, out_indices=[0, 1])
        return transformers.Dinov2Backbone(config).eval()
    config = small_config(transformers.CLIPVisionConfig, projection_dim=20)
    return transformers.CLIPVisionModelWithProjection(config).eval()


@pytest.mark.parametrize(
    ("name", "kind", "headless"),
    [
        ("classifier", "classes", False),
        ("headless", "features", True),
        ("backbone", "features", True),
        ("embeds", "features", True),
        ("segformer", "classes", None),
    ],
)
def test_models_of_transformers(name: str, kind: str, headless: bool | None) -> None:
    model = transformers_model(name)
    with torch.no_grad():
        output = model(tiny_images(2))
    metric = OutputMetric.of(model, output)
    assert (metric.kind, metric.guessed) == (kind, True)
    if headless is not None:
        assert is_headless(model, output) is headless
    assert metric.compare(model, output, output) == pytest.approx([1.0, 1.0])


def torchvision_vit(**options: Any) -> Any:
    models = pytest.importorskip("torchvision.models")
    return models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=1, num_heads=3, hidden_dim=48, mlp_dim=96, **options
    ).eval()


def test_models_of_torchvision() -> None:
    model = torchvision_vit(num_classes=7)
    assert OutputMetric.of(model, model(tiny_images(2))).kind == "classes"
    model.heads = nn.Identity()
    assert says_headless(model)
    # its last linear layer is the MLP's, as wide as the output
    assert OutputMetric.of(model, model(tiny_images(2))).kind == "features"
    hidden = nn.Sequential(model)  # behind a wrapper nothing says so but widths
    assert not says_headless(hidden)
    assert is_headless(hidden, hidden(tiny_images(2)))
    assert not has_classes(hidden, hidden(tiny_images(2)))


def test_models_of_timm() -> None:
    images = tiny_images(2)
    for classes, kind in ((5, "classes"), (0, "features")):
        model = tiny_vit(num_classes=classes)
        assert OutputMetric.of(model, model(images)).kind == kind
        assert says_headless(model) is (classes == 0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, embed_dim=48, num_heads=3,
        features_only=True, out_indices=(0, 1),
    ).eval()  # fmt: skip
    assert OutputMetric.of(model, model(images)).kind == "features"


def test_an_own_classifier_and_an_own_projection() -> None:
    trunk = nn.Sequential(nn.Flatten(), nn.Linear(3, 8), nn.LayerNorm(8))
    images = torch.zeros(2, 3)
    for last, kind in (
        (nn.Linear(8, 4), "classes"),
        (nn.Linear(8, 4, bias=False), "features"),  # projects embeddings
        (nn.Linear(8, 8), "features"),  # as wide as a layer inside
        (nn.Identity(), "features"),
    ):
        model = nn.Sequential(trunk, last)
        assert OutputMetric.of(model, model(images)).kind == kind


# --- which tensors -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrap",
    [
        lambda t: t, lambda t: (t, "more"), lambda t: {"logits": t, "loss": None},
        lambda t: SimpleNamespace(logits=t), lambda t: [t],
    ],
)  # fmt: skip
def test_answers_come_in_several_ways(wrap: Any) -> None:
    dense, patched = torch.eye(3), torch.eye(3)[[0, 1, 1]]
    assert CLASSES.compare(NOTHING, wrap(dense), wrap(patched)).tolist() == [1.0, 1.0, 0.0]  # type: ignore[union-attr]


def test_all_maps_count_and_not_the_first_alone() -> None:
    first, second = noise(2, 8, 4, 4), noise(2, 16, 2, 2, seed=1)
    expected = torch.tensor([[1.0, 1.0], [-1.0, -1.0]]).mean(0).tolist()
    for wrap in (list, tuple, lambda maps: dict(zip("ab", maps, strict=True)),
                 lambda maps: SimpleNamespace(feature_maps=tuple(maps))):  # fmt: skip
        found = FEATURES.compare(NOTHING, wrap([first, second]), wrap([first, -second]))
        assert found.tolist() == pytest.approx(expected)  # type: ignore[union-attr]


def test_features_only_models_compare_each_map_by_its_own_layout() -> None:
    model = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=32, window_size=4, features_only=True,
        embed_dim=24, depths=(1, 1), num_heads=(1, 2), out_indices=(0, 1),
    ).eval()  # fmt: skip
    dense, patched = model(tiny_images(2)), model(tiny_images(2) + 0.3)
    assert dense[0].shape[-1] == 24  # NHWC
    expected = [mean_cosine(x, y) for x, y in zip(dense, patched, strict=True)]
    mean = [sum(values) / 2 for values in zip(*expected, strict=True)]
    assert FEATURES.compare(model, dense, patched).tolist() == pytest.approx(mean, rel=1e-5)  # type: ignore[union-attr]


def test_one_field_of_an_output_object_counts() -> None:
    outputs = {"last_hidden_state": noise(2, 5, 8), "pooler_output": noise(2, 8), "loss": None}
    assert [x.shape for x in main_tensors(outputs)] == [(2, 5, 8)]
    depth = {"predicted_depth": noise(2, 4, 4)}
    assert [x.shape for x in main_tensors(depth)] == [(2, 16)]  # rows of pixels are no channels


@pytest.mark.parametrize(
    "output",
    [
        None, "text", [], {}, torch.zeros(3), torch.zeros(2, 3, dtype=torch.int64), [{"boxes": 1}],
        {"masks": torch.zeros(2, 1, 3, 4, 4)}, [torch.zeros(2, 3), None],
        {"a": torch.zeros(2, 3), "b": torch.zeros(6, 3)},
    ],
)  # fmt: skip
def test_what_cannot_be_compared_is_refused_with_a_way_out(output: Any) -> None:
    with pytest.raises(DataError, match=r"metric=function\(dense, patched\)"):
        FEATURES.compare(NOTHING, output, output)


# --- along which axis ----------------------------------------------------------------------------


def test_channels_are_found() -> None:
    square = torch.zeros(2, 4, 4, 7)
    assert channel_axis(NOTHING, square) == -1
    assert channel_axis(NOTHING, square.permute(0, 3, 1, 2)) == 1
    assert channel_axis(NOTHING, torch.zeros(2, 5, 7)) == -1
    odd = torch.zeros(2, 3, 5, 7)
    assert channel_axis(NOTHING, odd) == 1
    for says in ({"num_features": 7}, {"config": SimpleNamespace(hidden_size=7)}):
        assert channel_axis(SimpleNamespace(modules=list, **says), odd) == -1  # type: ignore[arg-type]
    assert channel_axis(nn.LayerNorm(7), odd) == -1
    assert channel_axis(SimpleNamespace(output_fmt="NCHW", modules=list), square) == 1  # type: ignore[arg-type]


def test_swin_without_a_head() -> None:
    model = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=32, window_size=4, num_classes=0, embed_dim=24,
        depths=(1, 1), num_heads=(1, 2),
    ).eval()  # fmt: skip
    features = FEATURES.outputs(model, (tiny_images(2),), {})
    other = features + noise(*features.shape)
    assert features.shape == (2, 4, 4, 48)
    assert FEATURES.compare(model, features, other).tolist() == pytest.approx(  # type: ignore[union-attr]
        mean_cosine(features, other), rel=1e-5
    )


def test_pixels_have_classes_of_their_own() -> None:
    dense, patched = noise(2, 7, 4, 5), noise(2, 7, 4, 5, seed=1)
    expected = []
    for image, other in zip(dense.tolist(), patched.tolist(), strict=True):
        same = 0
        for row in range(4):
            for column in range(5):
                one = max(range(7), key=lambda c: image[c][row][column])
                two = max(range(7), key=lambda c: other[c][row][column])
                same += one == two
        expected.append(same / 20)
    found = CLASSES.compare(NOTHING, {"logits": dense}, {"logits": patched})
    assert found.tolist() == pytest.approx(expected)  # type: ignore[union-attr]
    rows = (x.movedim(1, -1).flatten(1, 2) for x in (dense, patched))
    tokens = CLASSES.compare(NOTHING, *rows)
    assert tokens.tolist() == pytest.approx(expected)  # type: ignore[union-attr]


# --- the model is asked for all positions --------------------------------------------------------


def test_timm_models_are_asked_for_all_positions() -> None:
    images = tiny_images(2)
    for classes in (0, 5):
        model = tiny_vit(num_classes=classes)
        torch.testing.assert_close(
            FEATURES.outputs(model, (images,), {}), model.forward_features(images)
        )
    torch.testing.assert_close(CLASSES.outputs(model, (images,), {}), model(images))
    keyword = FEATURES.outputs(tiny_vit(num_classes=0), (), {"x": images})
    assert keyword.shape == (2, 48)


def test_pooled_outputs_hide_what_positions_show() -> None:
    model = tiny_vit(num_classes=0)
    images = tiny_images(2)
    with sparsiattn.patch(model, "local", k=1, background=None) as patch, torch.no_grad():
        with patch.disabled():
            dense = FEATURES.outputs(model, (images,), {})
        patched = FEATURES.outputs(model, (images,), {})
    found = FEATURES.compare(model, dense, patched)
    assert found.tolist() == pytest.approx(mean_cosine(dense, patched), rel=1e-5)  # type: ignore[union-attr]


# --- numbers -------------------------------------------------------------------------------------

vectors = st.lists(
    st.floats(-10, 10, width=32).filter(lambda x: x == 0 or abs(x) > 1e-3), min_size=4, max_size=4
).filter(any)


@given(vectors, vectors, st.sampled_from([1.0, 1e-30, 1e30]))
def test_cosine_is_that_of_plain_numbers_at_any_scale(
    one: list[float], other: list[float], scale: float
) -> None:
    found = cosine(
        torch.tensor([one], dtype=torch.float64) * scale,
        torch.tensor([other], dtype=torch.float64),
    )
    assert found.item() == pytest.approx(angle_cosine(one, other), abs=1e-9)
    assert abs(found.item()) <= 1 + 1e-12


def test_equal_zeros_are_kept_and_lost_zeros_are_not() -> None:
    zeros, ones = torch.zeros(1, 1, 3), torch.ones(1, 1, 3)
    assert cosine(zeros, zeros).tolist() == [1.0]
    assert cosine(zeros, ones).tolist() == cosine(ones, zeros).tolist() == [0.0]
    assert cosine(torch.zeros(0, 3), torch.zeros(0, 3)).shape == (0,)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_a_number_is_lost(bad: float) -> None:
    dense = noise(2, 3, 4)
    patched = dense.clone()
    patched[0, 1, 2] = bad
    assert cosine(dense, patched).tolist() == pytest.approx([2 / 3, 1.0])
    assert same_choice(dense, patched).tolist() == pytest.approx([2 / 3, 1.0])
    for metric in (FEATURES, CLASSES):
        with pytest.raises(DataError, match="dense model's output is not finite"):
            metric.compare(NOTHING, patched, dense)


def test_half_precision_does_not_overflow() -> None:
    large = torch.full((1, 8), 60000.0, dtype=torch.float16)
    assert cosine(large, large * 0.5).tolist() == pytest.approx([1.0])


def test_shapes_must_agree() -> None:
    for metric in (FEATURES, CLASSES):
        with pytest.raises(DataError, match=r"returns shape \(2, 1, 8\), the dense one"):
            metric.compare(NOTHING, noise(2, 5, 8), noise(2, 1, 8))


# --- what users name -----------------------------------------------------------------------------


def test_a_function_of_the_user_gives_a_number_or_one_for_each_image() -> None:
    def one(value: Any) -> Any:
        metric = OutputMetric.of(NOTHING, None, lambda dense, patched: value)
        assert (metric.kind, metric.guessed, metric.label) == ("callable", False, "metric")
        return metric.compare(NOTHING, None, None)

    assert one(0.5) == one(torch.tensor(0.5)) == 0.5
    assert one(True) == 1.0
    assert one(torch.tensor([1, 0])).tolist() == [1, 0]
    for wrong in (None, "x", torch.zeros(2, 2), [1.0, 2.0]):
        with pytest.raises(InvalidType, match="a number or a tensor"):
            one(wrong)


def test_names_are_checked() -> None:
    assert (FEATURES.label, CLASSES.label) == ("cosine", "answers kept")
    assert not OutputMetric.of(NOTHING, torch.zeros(2, 3), "features").guessed
    with pytest.raises(InvalidOption, match="'features' or 'classes' or a function"):
        OutputMetric.of(NOTHING, torch.zeros(2, 3), "accuracy")  # type: ignore[arg-type]
    with pytest.raises(InvalidOption, match="use metric='features'"):
        OutputMetric.of(tiny_vit(num_classes=0), torch.zeros(2, 48), "classes")
