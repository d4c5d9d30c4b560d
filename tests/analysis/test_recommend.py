"""Which setting is recommended, what is measured for it, and that the model is left alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import sparsiattn
from sparsiattn.analysis.recommendation import clock, contenders, searching
from sparsiattn.analysis.recommendation.choice import Goal
from sparsiattn.analysis.recommendation.families import Shape, families
from sparsiattn.analysis.recommendation.plan import Plan, Track
from sparsiattn.runtime import timing
from sparsiattn.testing.hosts import own_vit, tiny_images, tiny_vit, windowed_vit
from tests.support.made_up_speed import DEPTH, MadeUp, Options, World, options_of, quality_said


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


# --- the rule -----------------------------------------------------------------------------------


@dataclass
class Figures:
    ratio: float | None
    quality: float | None


def pick_by_loops(
    rows: list[Figures], speedup: float | None, quality: float | None
) -> Figures | None:
    """The rule of the docs, one comparison at a time."""
    best = None
    for row in rows:
        if row.ratio is None or row.quality is None:
            continue
        fast = speedup is None or row.ratio >= speedup
        good = quality is None or row.quality >= quality
        if speedup is None:
            rank = (1, row.ratio, row.quality) if good else (0, row.quality, row.ratio)
        elif fast:
            rank = (2, row.quality, row.ratio)
        else:
            rank = (int(good and quality is not None), row.ratio, row.quality)
        if best is None or rank > best[0]:
            best = rank, row
    return None if best is None else best[1]


numbers = st.one_of(st.none(), st.sampled_from([0.5, 0.9, 0.99, 1.0, 1.2, 1.4, 1.7, 2.0]))
rows_of_figures = st.lists(st.builds(Figures, numbers, numbers), max_size=8)


@settings(deadline=None)
@given(
    rows_of_figures,
    st.sampled_from([None, 1.2, 1.5, 3.0]),
    st.sampled_from([None, 0.9, 0.995]),
)
def test_the_pick_is_that_of_plain_loops(
    rows: list[Figures], speedup: float | None, quality: float | None
) -> None:
    if speedup is None and quality is None:
        return
    expected, got = pick_by_loops(rows, speedup, quality), Goal(speedup, quality).pick(rows)
    assert (got is None) == (expected is None)
    if got is not None and expected is not None:
        assert (got.ratio, got.quality) == (expected.ratio, expected.quality)


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


# --- speeds and qualities that are made up ------------------------------------------------------


def time_and_quality(options: Options) -> tuple[float, float]:
    """Merging costs least quality, sparse attention little time, dropping both."""
    match options["strategy"]:
        case "connectivity":
            return 0.75 + 0.25 * options["k"], 1.0 - 0.0003 / options["k"]
        case "token_merge":
            layers = len(options["layers"] or range(DEPTH))
            left = sum(options["ratio"] ** min(i + 1, layers) for i in range(DEPTH)) / DEPTH
            return left, 1.0 - 0.03 * (1 - left) ** 2 * (1.5 if layers < DEPTH else 1)
        case "token_drop":
            return 0.4 + 0.6 * options["keep"], options["keep"]
    return 1.1, 0.9


def on_its_own_clock(monkeypatch: pytest.MonkeyPatch) -> World:
    made = World(time_and_quality)
    monkeypatch.setattr(clock, "perf_counter", made.perf_counter)
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=made.perf_counter))
    return made


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    return on_its_own_clock(monkeypatch)


def made_up(world: World, **options: Any) -> sparsiattn.Recommendation:
    torch.manual_seed(0)
    model, images = MadeUp(world).eval(), torch.randn(8, 3, 32, 32)
    return sparsiattn.recommend(model, images, metric=quality_said, **options, **QUIET)


@pytest.mark.parametrize(
    ("goal", "met"),
    [
        ({"speedup": 2.0}, True),
        ({"quality": 0.995}, True),
        ({"speedup": 1.4, "quality": 0.98}, True),
        ({"speedup": 2.0, "quality": 0.999}, False),
    ],
)
def test_what_is_picked_is_as_good_as_can_be(
    world: World, goal: dict[str, float], met: bool
) -> None:
    found = made_up(world, **goal)
    tried = [row for row in found.table if row.settings and row.ratio is not None]
    assert 4 <= len(tried) <= 12
    assert found.met is met
    row = found.picked
    assert row is not None
    assert row is pick_by_loops(tried, goal.get("speedup"), goal.get("quality"))  # type: ignore[arg-type,comparison-overlap]
    # the figures are those that were made up, whatever was tried before and after
    share, quality = time_and_quality({"layers": None, **row.settings})
    assert row.ratio == pytest.approx(1 / share, rel=1e-3)
    assert row.quality == pytest.approx(quality, abs=1e-5)
    # no other number of any family that can be had would be better by more than a step
    everything = []
    for layers, least in ((None, 600), (range(DEPTH // 2), 500)):
        for x in range(least, 990, 5):
            options = {"strategy": "token_merge", "ratio": x / 1000, "layers": layers}
            share, quality = time_and_quality(options)
            everything.append(Figures(1 / share, quality))
    best = pick_by_loops(everything, goal.get("speedup"), goal.get("quality"))
    assert best is not None
    assert best.quality is not None
    assert best.ratio is not None
    assert row.quality > best.quality - 0.002
    if "speedup" not in goal:
        assert row.ratio > 0.95 * best.ratio


@pytest.fixture(scope="module")
def found() -> sparsiattn.Recommendation:
    """What is recommended for a speed, by the rule above."""
    with pytest.MonkeyPatch.context() as patcher:
        return made_up(on_its_own_clock(patcher), speedup=1.4)


def test_the_pick_ran_more_often_than_others(found: sparsiattn.Recommendation) -> None:
    assert found.picked is not None
    assert found.picked.rounds >= searching.FINE
    assert found.picked.images == 8


def test_a_goal_out_of_reach_gives_the_closest_and_the_bound(world: World) -> None:
    found = made_up(world, speedup=50.0, budget_s=20.0)
    assert not found.met
    assert found.picked is not None
    assert found.picked.ratio == max(row.ratio or 0 for row in found.table if row.settings)
    assert "not met" in found.verdict
    assert f"{found.bound:.2f}x" in str(found)
    assert found.bound == pytest.approx(1 / (1 - found.attention_share), rel=1e-3)


@pytest.mark.parametrize("goal", [{"speedup": 1.2}, {"quality": 0.9}])
def test_where_nothing_is_faster_nothing_is_recommended(
    world: World, goal: dict[str, float]
) -> None:
    world.rule = lambda options: (1.3, 0.99)
    found = made_up(world, **goal, budget_s=15.0)
    assert (found.line, found.settings, found.met, found.picked) == ("", {}, False, None)
    assert found.table
    assert str(found).startswith("nothing tried")
    with pytest.raises(sparsiattn.InvalidOption, match="nothing"):
        found.apply(tiny_vit())


@pytest.mark.parametrize("budget_s", [3.0, 10.0])
def test_the_budget_is_kept_by_one_measurement(world: World, budget_s: float) -> None:
    found = made_up(world, speedup=1.4, budget_s=budget_s)
    # one pair, and the pass before it
    assert found.seconds <= budget_s + 3 * world.dense_s
    assert any(row.ratio for row in found.table)
    cut = any("budget ended" in note for note in found.notes)
    assert cut or budget_s > 3


def test_a_slow_model_runs_in_smaller_batches_and_says_so(
    world: World, found: sparsiattn.Recommendation
) -> None:
    assert found.input_shape[0] == 1
    assert any("timed 1 at a time" in note for note in found.notes)
    options = {"speedup": 1.4, "budget_s": 2.0}
    assert made_up(world, **options, batch_size=2).input_shape[0] == 2
    world.dense_s = 0.001
    assert made_up(world, **options).input_shape[0] == 8


def test_smaller_images_are_in_the_table_and_never_the_pick(
    world: World, found: sparsiattn.Recommendation
) -> None:
    (row,) = [row for row in found.table if not row.settings]
    assert "pixels" in row.line
    assert row.ratio is not None
    world.rule = lambda options: (1.3, 0.5)  # smaller images are better than all else
    worse = made_up(world, speedup=1.2, budget_s=15.0)
    assert any(row.met for row in worse.table if not row.settings)
    assert worse.picked is None


def test_what_raises_while_it_runs_is_listed(world: World) -> None:
    def rule(options: Options) -> tuple[float, float]:
        if options["strategy"] == "token_merge":
            raise RuntimeError("out of memory; buy more")
        return time_and_quality(options)

    world.rule = rule
    found = made_up(world, speedup=1.2)
    reasons = {row.reason for row in found.table if row.settings.get("strategy") == "token_merge"}
    assert reasons == {"out of memory"}
    assert found.picked is not None
    assert found.picked.settings["strategy"] != "token_merge"


@settings(deadline=None, max_examples=40)
@given(
    st.floats(0.05, 0.8),
    st.floats(1.1, 4.0),
    st.floats(0.0, 0.3),
    st.floats(1.0, 3.0),
)
def test_refining_ends_just_beyond_the_goal(
    attention: float, speedup: float, overhead: float, power: float
) -> None:
    """Whatever the true times are, as long as they rise with what stays."""
    shape = Shape(attention, 200, 12)
    family = next(f for f in families(shape) if f.name == "token_merge")
    track = Track(family, Goal(speedup))

    def ratio(x: float) -> float:
        return 1.0 / (overhead + (1 - overhead) * family.time(x) ** power)

    for _ in range(12):
        x = track.next()
        if x is None:
            break
        assert x not in track.tried
        track.tried[x] = contender({}, ratio(x), x)
    else:
        raise AssertionError("it does not end")
    fast = [x for x in track.tried if ratio(x) >= speedup]
    if ratio(family.low) < speedup:
        assert not fast
        assert family.low in track.tried
    elif ratio(family.high) < speedup:
        nearest = max(fast)
        beyond = min((x for x in track.tried if ratio(x) < speedup), default=family.high)
        one_more = ratio(nearest) / ratio(min(beyond, family.high))
        assert ratio(nearest) <= 1.06 * speedup or one_more <= 1.06 or beyond - nearest <= 0.0051


def contender(options: dict[str, Any], ratio: float, quality: float) -> contenders.Contender:
    made = contenders.Contender(options, dense_s=[ratio], own_s=[1.0])
    made.note(0, quality)
    return made


def test_variants_wait_for_what_they_vary() -> None:
    goal = Goal(1.3)
    plan = Plan([Track(f, goal) for f in families(Shape(0.5, 2000, 12))], goal)
    names = []
    while (step := plan.next()) is not None:
        track, x = step
        names.append(track.family.name)
        speed, quality = (1.31, 0.999) if "connectivity" in names[-1] else (1.0, 0.5)
        track.tried[x] = contender(track.family.build(x), speed, quality)
    assert names.index("connectivity") < names.index("connectivity with tile=1")
    assert len(names) <= plan.most
    tile = next(t for t in plan.tracks if t.family.name == "connectivity with tile=1")
    parent = next(t for t in plan.tracks if t.family.name == "connectivity")
    assert next(iter(tile.tried)) in parent.tried


# --- real models --------------------------------------------------------------------------------


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


def test_apply_patches_and_to_dict_is_plain(world: World, found: sparsiattn.Recommendation) -> None:
    model = MadeUp(world).eval()
    with found.apply(model) as patch:
        strategy = patch.strategy.name
    assert strategy == found.settings["strategy"]
    data = json.loads(json.dumps(found.to_dict()))
    assert data["line"] == found.line
    assert len(data["table"]) == len(found.table)
    assert max(map(len, str(found).splitlines())) <= 101 or len(found.line) > 100


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


# --- progress -----------------------------------------------------------------------------------


def test_lines_say_how_much_time_is_left(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    model, images = MadeUp(world).eval(), torch.randn(8, 3, 32, 32)
    sparsiattn.recommend(model, images, metric=quality_said, speedup=1.4, budget_s=30)
    output = capsys.readouterr()
    lines = output.err.splitlines()
    assert output.out == ""
    assert lines[0].startswith("recommend: at most 30 s left")
    left = [int(line.split("at most ")[1].split()[0]) for line in lines]
    assert all(before - after >= 10 for before, after in pairwise(left))


def test_a_function_is_told_the_seconds(world: World) -> None:
    told: list[tuple[int, int | None]] = []
    torch.manual_seed(0)
    model, images = MadeUp(world).eval(), torch.randn(8, 3, 32, 32)
    sparsiattn.recommend(
        model, images, metric=quality_said, speedup=1.4,
        budget_s=15, progress=lambda done, total=None: told.append((done, total)),
    )  # fmt: skip
    assert told[0] == (0, 15)
    assert told == sorted(told)
