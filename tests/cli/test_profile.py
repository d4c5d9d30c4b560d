"""``sparsiattn profile``."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

import sparsiattn
from tests.support.commands import NAME, model_options, run, small

SMALL = small()
MODEL = ["profile", NAME, *model_options(SMALL)]


def document(*arguments: object) -> dict[str, Any]:
    return json.loads(run(*MODEL, *arguments, "--json").stdout)  # type: ignore[no-any-return]


def test_json_is_one_document_of_the_figures() -> None:
    found = document("--strategy", "local", "--k", "10", "-o", "background=None")
    assert found["name"] == found["model"] == "vit_tiny_patch16_224"
    assert found["tokens"] == [65, 65]
    assert found["mhsa_macs_dense"] == 2 * 2 * 65**2 * 48
    assert found["mhsa_macs"] == 2 * 2 * 48 * (64 * 10 + 65)
    assert found["flops"] == 2 * found["macs"] < found["flops_dense"]
    assert found["sites"][1]["name"] == "blocks.1.attn"
    assert found["accounting"] == "own"
    assert found["own"]["mhsa"] < found["computed"]["mhsa"]
    assert "MACs, not time" in "".join(found["notes"])


def test_unpatched_and_accountings() -> None:
    dense = document()
    assert dense["macs"] == dense["macs_dense"]
    assert dense["strategy"] == ""
    options = ("--strategy", "connectivity", "--k", "0.1", "-o", "scores=predictor")
    paper = document(*options, "--accounting", "paper")
    rows = 2 * 2 * 48 * (64 * math.ceil(6.5) + 65)
    assert paper["mhsa_macs"] == rows + paper["predictor_macs"]
    assert paper["predictor_macs"] == 2 * 2 * 65 * 10 * 48 + 11 * 3 * 65**2
    assert paper["own"]["mhsa"] > rows  # background keys


def test_tables_and_notes() -> None:
    out = run(
        *MODEL, "--strategy", "token_drop", "--keep", "[0.5]", "-o", "layers=[0]", "--batch-size",
        "2", "--latency", "--rounds", "1",
    ).stdout  # fmt: skip
    for word in ("vit_tiny_patch16_224", "projections", "MLP", "blocks.1.attn", "33", "ms",
                 "by the accounting 'own'"):  # fmt: skip
        assert word in out
    # a column that has nothing to say is left out
    assert "measured" not in run(*MODEL, "--strategy", "local").stdout
    timed = run(*MODEL, "--strategy", "local", "--latency", "--rounds", 1).stdout
    assert "measured" in timed


def test_saved_planners(tmp_path: Path) -> None:
    torch.manual_seed(0)
    live = sparsiattn.patch(timm.create_model("vit_tiny_patch16_224", **SMALL), "local", k=7)
    live.save(tmp_path / "saved")
    found = document("--patch", tmp_path / "saved", "--image-size", "32")
    assert found["strategy"] == "local"
    assert found["sites"][0]["density"] == pytest.approx((64 * 7 + 65) / 65**2)


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["profile", "no_such_model"], 1, "no_such_model"),
        ([*MODEL, "--strategy", "no_such"], 1, "no_such"),
        ([*MODEL, "--k", "0.1"], 2, "strategy"),
        ([*MODEL, "--only-if-faster"], 2, "strategy"),
        ([*MODEL, "--accounting", "papers"], 2, "papers"),
        ([*MODEL, "--rounds", "0"], 2, "rounds"),
    ],
)
def test_faults_are_one_line(arguments: list[str], code: int, says: str) -> None:
    result = run(*arguments, code=code)
    assert says in result.output
    assert "Traceback" not in result.output
