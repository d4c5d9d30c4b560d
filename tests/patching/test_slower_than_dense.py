"""`SlowerThanDense`: who is told that a patch loses time, how much, and what to type instead."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from timm import models

import sparsiattn
from sparsiattn import SlowerThanDense
from sparsiattn.kernels import Gather, cost
from sparsiattn.patching import model_speed
from sparsiattn.patching.estimate import expect
from tests.support import zoo

FIGURE = re.compile(r"(\d\.\d\d)x of dense")


@contextmanager
def heard() -> Iterator[list[warnings.WarningMessage]]:
    """Warnings of the block about speed."""
    told: list[warnings.WarningMessage] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", SlowerThanDense)
        yield told
    told += caught


def test_the_caller_is_told_once_how_much_and_what_else() -> None:
    model, x = zoo.build("vit"), torch.randn(1, 3, 32, 32)
    dense = model(x)
    with heard() as told:
        patch = sparsiattn.patch(model, "topk", k=0.25)
    (warning,) = told
    text = str(warning.message)
    assert warning.filename == __file__
    assert text.startswith("topk on 2 sites of VisionTransformer: ")
    assert not torch.equal(model(x), dense), "what was asked for is done"
    report = patch.report()
    assert report.speed is not None
    assert report.speed < 0.98
    note = text.partition(": ")[2]
    assert note.startswith(f"expected speed {report.speed:.2f}x of dense; try ")
    assert note in repr(patch)
    assert str(report).splitlines()[0].endswith(note)
    patch.unpatch()
    assert note not in repr(patch)


@pytest.mark.parametrize("name", ["vit", "convit", "swin", "vit_differential"])
def test_what_it_says_to_type_is_no_slower(name: str) -> None:
    model = zoo.build(name)
    with sparsiattn.patch(model, "topk", k=0.25) as patch:
        instead = patch.report().instead
    strategies = [re.fullmatch(r"strategy='(\w+)'", advice) for advice in instead]
    names = [match[1] for match in strategies if match]
    assert names == ([] if name in ("swin", "vit_differential") else ["token_drop", "token_merge"])
    assert instead[-1] == "only_if_faster=True"
    lines: list[dict[str, Any]] = [{"strategy": "topk", "k": 0.25, "only_if_faster": True}]
    for line in [*lines, *({"strategy": strategy} for strategy in names)]:
        with heard() as told, sparsiattn.patch(model, **line) as patch:
            speed = patch.report().speed
        assert not told
        assert speed is not None
        assert speed >= 1.0


@pytest.mark.parametrize("strategy", ["local", "topk"])
def test_larger_images_are_advised_where_they_help(strategy: str) -> None:
    """The oracle of exact keys computes every logit, which larger images make dearer."""
    with sparsiattn.patch(zoo.build("vit"), strategy, k=0.25) as patch:
        advised = "larger images" in patch.report().instead
    large = models.VisionTransformer(**{**zoo.TINY, "img_size": 192})
    with sparsiattn.patch(large, strategy, k=0.25) as patch:
        assert advised == (patch.report().sites[0].expected >= 1)
    assert advised == (strategy == "local")


@pytest.mark.parametrize(
    ("name", "strategy"),
    [
        ("vit", "topk"),
        ("vit", "longformer"),
        ("swin", "topk"),
        ("hiera", "topk"),
        ("vit_relpos", "hybrid"),
    ],
)
def test_warning_and_report_agree(name: str, strategy: str) -> None:
    model = zoo.build(name)
    with heard() as told, sparsiattn.patch(model, strategy, only_if_faster=False) as patch:
        report = patch.report()
    assert report.speed is not None
    (warning,) = told
    assert FIGURE.findall(str(warning.message)) == [f"{report.speed:.2f}"]


def test_macs_that_it_counts_are_those_of_the_report() -> None:
    for name in ("vit_unfused", "vit_differential", "samvit", "convit", "hiera"):
        with sparsiattn.patch(zoo.build(name), "topk") as patch:
            assert patch.attention.macs == patch.report().macs_dense, name


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({"strategy": "dense"}, torch.float32),
        ({"strategy": "token_drop"}, torch.float32),
        ({"strategy": "topk", "k": 1.0}, torch.float32),
        ({"strategy": "topk", "kernel": "sdpa"}, torch.float32),
        ({"strategy": "topk", "only_if_faster": True}, torch.float32),
        ({"strategy": "topk"}, torch.bfloat16),  # whose prices are a guess before `tune`
    ],
)
def test_nobody_is_told(options: dict[str, Any], dtype: torch.dtype) -> None:
    with heard() as told, sparsiattn.patch(zoo.build("vit").to(dtype), **options) as patch:
        assert "instead" not in repr(patch)
    assert not told


@pytest.fixture
def fast_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention takes no time, and neither does planning."""
    monkeypatch.setattr(Gather, "speed", lambda *_: 50.0)
    monkeypatch.setattr(cost.Planning, "share", lambda *_: 0.0)


@pytest.mark.usefixtures("fast_kernel")
def test_small_models_lose_by_what_python_takes_at_every_site() -> None:
    small, large = (
        models.VisionTransformer(img_size=96, embed_dim=dim, depth=2, num_heads=4).eval()
        for dim in (64, 1024)
    )
    with heard() as told, sparsiattn.patch(small, "local", k=0.25) as patch:
        assert patch.report().speed < 0.5  # type: ignore[operator]
        assert "only_if_faster=True" in repr(patch)  # attention would win, were there no Python
    assert len(told) == 1
    with heard() as told, sparsiattn.patch(large, "local", k=0.25) as patch:
        assert patch.report().speed > 0.98  # type: ignore[operator]
    assert not told


@pytest.mark.usefixtures("fast_kernel")
def test_a_site_stays_dense_that_saves_less_than_python_takes() -> None:
    tokens = {"img_size": 384, "embed_dim": 384, "num_heads": 6, "depth": 1}
    few, many = (
        models.VisionTransformer(**{**tokens, "img_size": size}).eval() for size in (32, 384)
    )
    for model, dense in ((few, True), (many, False)):
        with sparsiattn.patch(model, "local", k=0.25, only_if_faster=True) as patch:
            (site,) = patch.report().sites
        assert (site.kernel == "dense") is dense
        assert ("less time than Python takes there" in site.note) is dense


@pytest.mark.usefixtures("fast_kernel")
def test_a_kernel_that_wins_needs_no_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_speed, "SITE_MACS", 0)
    with heard() as told, sparsiattn.patch(zoo.build("vit"), "local", k=0.25) as patch:
        report = patch.report()
    assert not told
    assert not report.instead
    assert "expected speed" not in str(report).splitlines()[0]


def test_who_patches_for_others_stays_silent(tmp_path: Path) -> None:
    model, x = zoo.build("vit"), torch.randn(1, 3, 32, 32)
    with sparsiattn.patch(model, "topk", k=0.25) as patch:
        patch.save(tmp_path)
        note = repr(patch).partition("'auto'")[2]
    assert "expected speed" in note
    with heard() as told:
        sparsiattn.bench(model, x, strategy="topk", k=0.25, rounds=1)
        sparsiattn.inspect(model, strategies=["topk"])
        with sparsiattn.load(model, tmp_path) as loaded:
            assert repr(loaded).endswith(note)
            assert repr(sparsiattn.patch_of(copy.deepcopy(model))).endswith(note)
    assert not told


def test_as_an_error_it_leaves_the_model_alone() -> None:
    model = zoo.build("vit")
    with warnings.catch_warnings():
        warnings.simplefilter("error", SlowerThanDense)
        with pytest.raises(SlowerThanDense, match="expected speed"):
            sparsiattn.patch(model, "topk", k=0.25)
    assert sparsiattn.patch_of(model) is None


def test_sites_measured_to_be_slower_than_expected_ask_for_tuning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Gather, "speed", lambda *_: 50.0)
    monkeypatch.setattr(cost.Planning, "share", lambda *_: 0.0)
    monkeypatch.setattr(cost, "SITE_SECONDS", 0.0)
    with sparsiattn.patch(zoo.build("vit"), "local", k=0.25) as patch:
        for runtime in patch.runtimes:
            runtime.note_measured(0.5, expect(runtime, None).choice)
        assert patch.report().instead[-1] == "only_if_faster=True after tune()"
