"""Real models and images: what is measured, what is refused, and that the model is left alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import sparsiattn
from sparsiattn.analysis.recommendation import clock
from sparsiattn.runtime import timing
from sparsiattn.testing.hosts import own_vit, tiny_images, tiny_vit, windowed_vit
from tests.support.across_views import AcrossViews
from tests.support.made_up_speed import options_of


class Ticking:
    """A clock that goes on by a hundredth of a second whenever somebody looks."""

    def __init__(self) -> None:
        self.looks = 0

    def perf_counter(self) -> float:
        self.looks += 1
        return self.looks / 100


@pytest.fixture(autouse=True)
def ticking(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is measured does not depend on how busy the machine is."""
    by = Ticking()
    monkeypatch.setattr(clock, "perf_counter", by.perf_counter)
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=by.perf_counter))


QUIET: dict[str, Any] = {"progress": False}
SHORT: dict[str, Any] = {"budget_s": 0.15, **QUIET}


def test_a_goal_is_needed_and_in_range() -> None:
    for wrong in ({}, {"speedup": 1.0}, {"speedup": "2"}, {"quality": 1.5}, {"quality": True}):
        with pytest.raises(sparsiattn.InvalidOption):
            sparsiattn.recommend(tiny_vit(), tiny_images(), **wrong, **QUIET)
    for budget in (0, -1.0, float("nan"), float("inf"), "60"):
        with pytest.raises(sparsiattn.InvalidOption, match="budget_s"):
            sparsiattn.recommend(tiny_vit(), tiny_images(), speedup=2, budget_s=budget, **QUIET)  # type: ignore[arg-type]
    for size in (0, 1.5, True):
        with pytest.raises(sparsiattn.InvalidOption, match="batch_size"):
            sparsiattn.recommend(tiny_vit(), tiny_images(), speedup=2, batch_size=size, **QUIET)


def headless() -> nn.Module:
    model = tiny_vit(num_classes=0, global_pool="")
    model.train()
    return model


class Answering(nn.Module):
    """A model whose answer is a dict, as those of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.vit = tiny_vit()
        self.pretrained_cfg = {"input_size": (3, 32, 32)}

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        return {"logits": self.vit(pixel_values)}


@pytest.mark.parametrize(
    ("make", "metric"),
    [(tiny_vit, "classes"), (headless, "features"), (Answering, "classes"), (own_vit, "classes")],
)
def test_the_metric_that_fits_is_found_and_named(
    make: Callable[[], nn.Module], metric: str
) -> None:
    found = sparsiattn.recommend(make(), tiny_images(4), quality=0.0, **SHORT)
    assert (found.metric, found.metric_guessed) == (metric, True)
    assert "guessed" in str(found)
    assert all(0 <= (row.quality or 0) <= 1 + 1e-6 for row in found.table)


def test_the_line_makes_the_patch_that_was_measured() -> None:
    model, x = tiny_vit(), tiny_images(4)
    found = sparsiattn.recommend(model, x, quality=0.0, budget_s=0.4, **QUIET)
    for row in found.table:
        if row.reason or not row.settings:
            continue
        patch = eval(row.line, {"sparsiattn": sparsiattn, "model": model})
        typed = options_of(model)
        with torch.no_grad():
            wanted = model(x)
        patch.unpatch()
        with sparsiattn.patch(model, **row.settings), torch.no_grad():
            assert options_of(model) == typed
            assert torch.equal(model(x), wanted)
        json.dumps(row.settings)


def state(model: nn.Module) -> tuple[Any, ...]:
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    return tensors, modes, hooks, [type(m) for m in model.modules()]


def assert_untouched(model: nn.Module, before: tuple[Any, ...]) -> None:
    after = state(model)
    assert before[1:] == after[1:]
    assert before[0].keys() == after[0].keys()
    assert all(torch.equal(before[0][name], after[0][name]) for name in before[0])
    assert sparsiattn.patch_of(model) is None


def test_the_model_stays_as_it_was() -> None:
    model = tiny_vit().train()
    model.blocks[0].eval()  # type: ignore[index,operator,union-attr]
    before, attention = state(model), nn.functional.scaled_dot_product_attention
    sparsiattn.recommend(model, tiny_images(4), speedup=1.1, **SHORT)
    assert_untouched(model, before)
    assert nn.functional.scaled_dot_product_attention is attention


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_the_model_stays_as_it_was_whatever_ends_it(error: type[BaseException]) -> None:
    model = tiny_vit()
    before, attention = state(model), nn.functional.scaled_dot_product_attention
    calls = 0

    def metric(dense: Tensor, patched: Tensor) -> float:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise error("stop")
        return 1.0

    options = {"speedup": 1.1, "metric": metric, "budget_s": 0.4, **QUIET}
    if error is KeyboardInterrupt:
        with pytest.raises(error):
            sparsiattn.recommend(model, tiny_images(4), **options)
    else:
        found = sparsiattn.recommend(model, tiny_images(4), **options)
        assert "stop" in {row.reason for row in found.table}
    assert_untouched(model, before)
    assert nn.functional.scaled_dot_product_attention is attention


def test_a_patched_model_is_refused_by_name() -> None:
    model = tiny_vit()
    with sparsiattn.patch(model, "topk", k=0.25) as patch:
        with pytest.raises(sparsiattn.AlreadyPatched, match=r"topk.*unpatch"):
            sparsiattn.recommend(model, tiny_images(), speedup=2, **QUIET)
        assert sparsiattn.patch_of(model) is patch


def test_what_a_model_refuses_is_in_the_table_in_short() -> None:
    found = sparsiattn.recommend(windowed_vit(), tiny_images(4), quality=0.0, budget_s=2, **QUIET)
    refused = [row for row in found.table if row.reason]
    assert {"token_merge", "token_drop"} <= {row.settings.get("strategy") for row in refused}
    assert all(len(row.reason) <= 110 for row in refused)
    assert any(row.ratio for row in found.table)
    assert "left out: token_merge" in str(found)


def test_a_model_without_attention_is_refused() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 5))
    with pytest.raises(sparsiattn.SparsiattnError, match=r"no attention|image size"):
        sparsiattn.recommend(model, tiny_images(), speedup=2, **QUIET)


# --- images -------------------------------------------------------------------------------------


class Nothing:
    def __iter__(self) -> Iterator[Tensor]:
        return iter(())


@pytest.mark.parametrize(
    ("images", "says"),
    [
        ([], "no images"),
        (Nothing(), "no images"),
        (tiny_images(3)[:0], "no images"),
        (tiny_images(1)[0], "image\\[None\\]"),
        (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), "labels; got uint8"),
        ("photos", "got str"),
        (None, "got NoneType"),
        ([tiny_images(1), torch.zeros(1, 3, 48, 48)], "of one size"),
        (torch.zeros(1, 3, 40, 40), "does not run on images of shape 1x3x40x40"),
        (torch.zeros(1, 1, 32, 32), "does not run on images"),
        (torch.full((2, 3, 32, 32), torch.nan), "not finite"),
    ],
)
def test_images_that_will_not_do_are_named_in_one_line(images: Any, says: str) -> None:
    with pytest.raises(sparsiattn.DataError, match=says) as caught:
        sparsiattn.recommend(tiny_vit(), images, speedup=1.5, **QUIET)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    "images",
    [
        tiny_images(1),
        [tiny_images(2), tiny_images(1)],
        [(tiny_images(2), torch.zeros(2))],
        ({"pixel_values": tiny_images(2), "labels": torch.zeros(2)} for _ in range(2)),
    ],
    ids=["one", "batches", "pairs", "mappings"],
)
def test_images_come_in_many_ways(images: Any) -> None:
    found = sparsiattn.recommend(tiny_vit(), images, quality=0.0, **SHORT)
    assert any(row.ratio for row in found.table)
    assert found.images >= 1


def test_images_of_another_size_are_part_of_the_line() -> None:
    model = tiny_vit(dynamic_img_size=True)
    x = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    found = sparsiattn.recommend(model, x, quality=0.0, **SHORT)
    row = next(row for row in found.table if row.settings and not row.reason)
    assert "input=(1, 3, 48, 48)" in row.line
    patch = eval(row.line, {"sparsiattn": sparsiattn, "model": model})
    assert patch.input_shape == (1, 3, 48, 48)


def test_features_of_smaller_images_are_compared_on_the_full_grid() -> None:
    model = timm.models.VisionTransformer(
        img_size=64, patch_size=8, embed_dim=24, depth=2, num_heads=2, num_classes=0
    ).eval()
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    found = sparsiattn.recommend(model, x, speedup=1.5, budget_s=3.0, **QUIET)
    (row,) = [row for row in found.table if not row.settings]
    side = int(row.line.split()[2])
    small = nn.functional.interpolate(x, (side, side), mode="bicubic", antialias=True)
    lower = timm.models.VisionTransformer(
        img_size=64, patch_size=8, embed_dim=24, depth=2, num_heads=2, num_classes=0
    ).eval()
    lower.load_state_dict(model.state_dict())
    lower.set_input_size(img_size=(side, side))
    with torch.no_grad():
        dense, got = model.forward_features(x), lower.forward_features(small)
        grid = side // 8
        maps = got[:, 1:].mT.reshape(2, 24, grid, grid)
        full = nn.functional.interpolate(maps, (8, 8), mode="bilinear").flatten(2).mT
    same = nn.functional.cosine_similarity(torch.cat([got[:, :1], full], 1), dense, dim=-1)
    assert row.quality == pytest.approx(same.mean().item(), abs=1e-4)


def test_a_model_of_several_views() -> None:
    torch.manual_seed(0)
    model, images = AcrossViews().eval(), torch.randn(2, 3, 3, 32, 48)
    found = sparsiattn.recommend(model, images, quality=0.5, budget_s=2.0, progress=False)
    families = {row.family for row in found.table}
    assert "early layers within each view" in families
    first = next(row for row in found.table if row.settings.get("strategy") == "avggt")
    assert first.quality is not None
    assert found.input_shape[1:] == (3, 3, 32, 48)


def test_images_of_too_many_axes_are_refused() -> None:
    with pytest.raises(sparsiattn.DataError, match=r"with one more axis.*\[1, 1, 1, 3, 8, 8\]"):
        sparsiattn.recommend(tiny_vit(), torch.zeros(1, 1, 1, 3, 8, 8), quality=0.5)
