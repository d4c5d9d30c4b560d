"""``sparsiattn recommend``."""

from __future__ import annotations

import json
from pathlib import Path

from tests.support.commands import NAME, model_options, run, small
from tests.support.pictures import folder

SMALL = small(8)
MODEL = [NAME, *model_options(SMALL)]


def test_one_document_on_stdout_and_progress_beside_it(tmp_path: Path) -> None:
    data = folder(tmp_path / "images")
    result = run("recommend", *MODEL, "--data", data, "--quality", "0", "--images", 4,
                 "--budget", "0.5", "--json")  # fmt: skip
    found = json.loads(result.stdout)
    assert found["metric"] == "classes"
    assert found["quality"] == 0
    assert any(row["ratio"] for row in found["table"])
    assert "s left" in result.stderr


def test_text_begins_with_the_verdict(tmp_path: Path) -> None:
    data = folder(tmp_path / "images")
    result = run("recommend", *MODEL, "--data", data, "--speedup", "90", "--budget", "0.3",
                 "--metric", "features")  # fmt: skip
    assert result.stdout.startswith(("nothing tried", "speedup >= 90"))
    assert "cosine" in result.stdout


def test_without_data_or_goal_it_says_what_to_give(tmp_path: Path) -> None:
    result = run("recommend", *MODEL, "--speedup", "1.5", code=2)
    said = " ".join(result.stderr.replace("│", " ").split())
    assert "folder of images" in said
    assert "sparsiattn bench" in said
    result = run("recommend", *MODEL, "--data", tmp_path, code=2)
    assert "--speedup" in result.stderr


def test_a_wrong_metric_is_one_line(tmp_path: Path) -> None:
    data = folder(tmp_path / "images")
    result = run(
        "recommend", *MODEL, "--data", data, "--speedup", "1.5", "--metric", "top1", code=2
    )
    assert "'top1' is not one of 'classes', 'features'" in result.stderr
