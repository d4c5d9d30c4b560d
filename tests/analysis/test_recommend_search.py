"""What is tried, measured and picked, where speeds and qualities are made up."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import count, cycle, pairwise
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import sparsiattn
from sparsiattn.analysis.recommendation import contenders, searching
from sparsiattn.analysis.recommendation.choice import Goal
from sparsiattn.analysis.recommendation.families import Shape, families
from sparsiattn.analysis.recommendation.plan import Plan, Track
from sparsiattn.testing.hosts import tiny_vit
from tests.support.made_up_speed import (
    DEPTH,
    MadeUp,
    Options,
    World,
    on_its_own_clock,
    quality_said,
)

QUIET: dict[str, Any] = {"progress": False}


# --- the rule -----------------------------------------------------------------------------------


@dataclass
class Figures:
    ratio: float | None
    quality: float | None


def test_what_is_slower_than_dense_meets_no_goal() -> None:
    slow, fast = Figures(0.9, 1.0), Figures(1.1, 1.0)
    assert [Goal(quality=0.5).met_by(row) for row in (slow, fast)] == [False, True]


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


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    return on_its_own_clock(monkeypatch, time_and_quality)


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
        return made_up(on_its_own_clock(patcher, time_and_quality), speedup=1.4)


def test_the_pick_ran_more_often_than_others(found: sparsiattn.Recommendation) -> None:
    assert found.picked is not None
    assert found.picked.rounds >= searching.FINE
    assert found.picked.images == 8


def test_speeds_that_contradict_each_other_are_noted(
    world: World, found: sparsiattn.Recommendation
) -> None:
    assert not any("far apart" in note for note in found.notes)
    shares = cycle((0.3, 0.3, 0.8, 0.8))
    world.rule = lambda options: (next(shares), 0.99)
    busy = made_up(world, speedup=1.2)
    assert busy.picked is not None
    assert busy.picked.ratio_quartiles is not None
    low, high = busy.picked.ratio_quartiles
    assert high > 1.5 * low
    assert f"({low:.2f} to {high:.2f})" in str(busy)


@pytest.mark.parametrize("every", [5, 8, 11])
@pytest.mark.parametrize("slow", [2.0, 4.0])
def test_other_work_on_the_machine_misleads_nobody(world: World, every: int, slow: float) -> None:
    """Each so many-th pass takes much longer than it would alone."""
    quiet = made_up(world, speedup=1.4)
    passes = count(1)

    def busy(options: Options) -> tuple[float, float]:
        share, quality = time_and_quality(options)
        return share * (slow if next(passes) % every == 0 else 1.0), quality

    world.rule = busy
    found = made_up(world, speedup=1.4)
    assert found.picked is not None
    assert quiet.picked is not None
    share, _ = time_and_quality({"layers": None, **found.picked.settings})
    assert 1 / share > 1.35
    assert (found.picked.quality or 0) > (quiet.picked.quality or 0) - 0.004


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
@example(0.4391552321232079, 1.1, 0.20567595332928143, 1.0)  # 1.09999 is 1.1
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
        # to four digits, as contenders have it
        return round(1.0 / (overhead + (1 - overhead) * family.time(x) ** power), 4)

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


def test_apply_patches_and_to_dict_is_plain(world: World, found: sparsiattn.Recommendation) -> None:
    model = MadeUp(world).eval()
    with found.apply(model) as patch:
        strategy = patch.strategy.name
    assert strategy == found.settings["strategy"]
    data = json.loads(json.dumps(found.to_dict()))
    assert data["line"] == found.line
    assert len(data["table"]) == len(found.table)
    assert max(map(len, str(found).splitlines())) <= 101 or len(found.line) > 100


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
