"""``sparsiattn bench``: one patch, or the short list of `recommend`."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import sparsiattn
from sparsiattn.analysis.recommendation.short_list import short_list
from sparsiattn.cli import bench_list
from sparsiattn.cli.model_command import ModelRequest
from sparsiattn.cli.options import flags_of
from tests.support.commands import NAME, model_options, run, small

SMALL = small(8)
MODEL = ["bench", NAME, *model_options(SMALL), "--rounds", 1]


def test_without_a_strategy_it_times_the_short_list() -> None:
    found = json.loads(run(*MODEL, "--json").stdout)
    rows = found["short_list"]
    names = [row["settings"]["strategy"] for row in rows]
    assert sorted(names) == [
        "connectivity",
        "hybrid",
        "token_drop",
        "token_merge",
        "token_merge",
    ]
    ratios = [row["ratio"] for row in rows]
    assert ratios == sorted(ratios, reverse=True)
    # keys of earlier versions are those of the fastest
    assert found["ratio"] == ratios[0]
    assert found["strategy"] == names[0]
    assert found["report"]["sites"]
    assert found["name"] == NAME


def test_the_text_is_a_table_and_the_next_command() -> None:
    result = run(*MODEL)
    assert result.stderr == ""  # also not that weights are random: speed does not depend on them
    assert result.stdout.startswith(f"{NAME}, input 1x3x32x32, float32 on cpu, 1 paired run\n")
    for word in ("setting", "speed-up", "quartiles", "--strategy token_drop --keep", "fuse=true"):
        assert word in result.stdout
    words = shlex.join([NAME, *model_options(SMALL)])  # the model that was timed
    # the goal follows the speed of this run
    starts = tuple(bench_list._next(words, ratio).split("--speedup")[0] for ratio in (2, 1))
    assert result.stdout.splitlines()[-1].startswith(starts)


def test_the_next_command_measures_what_was_timed() -> None:
    request = ModelRequest(NAME, pretrained=True, checkpoint=Path("a b.pth"), image_size=32)
    result: Any = SimpleNamespace(device="cuda:1", dtype="float32")
    assert bench_list._words(request, result) == (
        f"{NAME} --pretrained --checkpoint 'a b.pth' --image-size 32 --device cuda:1"
    )


def test_what_to_do_next() -> None:
    assert bench_list._next(NAME, 1.7).endswith(f"recommend {NAME} --data FOLDER --speedup 1.5")
    assert bench_list._next(NAME, 1.01).endswith("--speedup 1.1")
    assert "none of these is faster" in bench_list._next(NAME, 0.97)


def test_a_setting_of_the_table_is_what_commands_take() -> None:
    row = json.loads(run(*MODEL, "--json").stdout)["short_list"][-1]
    again = json.loads(run(*MODEL, *shlex.split(row["options"]), "--json").stdout)
    assert "short_list" not in again
    assert again["strategy"] == row["settings"]["strategy"]


def test_any_option_of_the_patch_means_one_patch(tmp_path: Path) -> None:
    found = json.loads(run(*MODEL, "--k", "3", "--json").stdout)
    assert found["strategy"] == "connectivity"
    assert {site["k"] for site in found["report"]["sites"]} == {3}
    model = sparsiattn.create_model(NAME, **SMALL)
    sparsiattn.patch(model, "local", k=2).save(tmp_path)
    for how in (("--patch", tmp_path), ("--planners", tmp_path)):
        assert json.loads(run(*MODEL, *how, "--json").stdout)["strategy"] == "local"


def test_what_a_model_refuses_stands_below(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = [{"strategy": "local", "k": 2}, {"strategy": "local", "k": -1}]
    monkeypatch.setattr(
        "sparsiattn.analysis.recommendation.short_list.short_list", lambda *_: settings
    )
    result = run(*MODEL)
    assert "not possible: --strategy local --k -1: k must be" in result.stdout
    monkeypatch.setattr(
        "sparsiattn.analysis.recommendation.short_list.short_list", lambda *_: settings[1:]
    )
    assert "refuses every setting" in run(*MODEL, code=1).stderr


def test_a_model_without_attention_is_one_line() -> None:
    result = run("bench", "resnet18", code=1)
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")


def test_the_short_list_has_what_recommend_tries_first() -> None:
    """Of windows, too, and at another size than the model's."""
    import torch

    model = sparsiattn.create_model("swin_tiny_patch4_window7_224")
    listed: list[Any] = short_list(model, torch.zeros(1, 3, 224, 224))
    assert listed[0] == {
        "strategy": "token_drop",
        "keep": listed[0]["keep"],
        "skip": "window",
        "score": "norm",
    }
    timed = bench_list.Timed({"strategy": "local", "k": 3, "input": (1, 3, 8, 8)}, reason="no")
    assert timed.flags == "--strategy local --k 3"
    assert timed.to_dict()["ratio"] is None


def test_settings_as_options() -> None:
    settings = {"strategy": "hybrid", "k": [0.1, 2], "tokens": {"name": "token_merge"}}
    assert shlex.split(flags_of({**settings, "only_if_faster": None})) == [
        "--strategy", "hybrid", "--k", "[0.1,2]", "-o", 'tokens={"name":"token_merge"}',
    ]  # fmt: skip
