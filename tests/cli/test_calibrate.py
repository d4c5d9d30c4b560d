"""``sparsiattn calibrate``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

import sparsiattn
from tests.support.commands import NAME, model_options, run, small
from tests.support.pictures import folder

SMALL = small()
MODEL = [NAME, *model_options(SMALL)]


def small() -> Any:
    torch.manual_seed(7)
    model = timm.create_model("vit_tiny_patch16_224", **SMALL)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture
def start(tmp_path: Path) -> list[object]:
    save_file(small().state_dict(), tmp_path / "weights.safetensors")
    data = folder(tmp_path / "images")
    fitting = [
        "--steps",
        4,
        "--batch-size",
        2,
        "--k",
        "0.3",
        "-o",
        "scores=predictor",
        "--out",
        tmp_path / "fitted",
    ]
    weights = ["--checkpoint", tmp_path / "weights.safetensors"]
    return ["calibrate", *MODEL, "--data", data, *weights, *fitting]


def test_it_equals_calibrate_and_eval_reads_it(start: list[object], tmp_path: Path) -> None:
    found = json.loads(run(*start, "--json").stdout)
    model = small()
    with sparsiattn.patch(model, k=0.3, scores="predictor"):
        losses = sparsiattn.calibrate(model, tmp_path / "images", steps=4, batch_size=2)
        fitted = {n: t.clone() for n, t in model.state_dict().items() if ".sparsiattn." in n}
    assert found["losses"] == losses
    assert found["strategy"]["options"]["k"] == 0.3
    sparsiattn.load(model, tmp_path / "fitted")
    for name, value in fitted.items():
        assert torch.equal(model.state_dict()[name], value), name
    # checkpoints are for a run that was interrupted
    assert not [path for path in (tmp_path / "fitted").rglob("*") if "optimizer" in path.name]
    again = run(*start)  # finished: the same weights are written once more
    assert f"loss {losses[0]:.4f} -> {losses[-1]:.4f} in 4 steps" in again.stdout
    evaluated = run("eval", *MODEL, "--data", tmp_path / "images", "--patch",
                    tmp_path / "fitted", "--checkpoint", tmp_path / "weights.safetensors",
                    "--json")  # fmt: skip
    assert json.loads(evaluated.stdout)["strategy"]["name"] == "connectivity"


def test_it_goes_on_after_a_kill(
    start: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = json.loads(run(*start, "--json").stdout)["losses"]
    (tmp_path / "fitted").rename(tmp_path / "first")

    def killed(self: Any, *args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sparsiattn.Patch, "save", killed)
    run(*start, code=130)
    assert (tmp_path / "fitted" / "fit").is_dir()
    monkeypatch.undo()
    assert json.loads(run(*start, "--json").stdout)["losses"] == expected
    assert not (tmp_path / "fitted" / "fit").exists()


def test_what_cannot_be_fitted_is_a_failure(start: list[object]) -> None:
    plain = [x for x in start if x not in ("-o", "scores=predictor")]
    result = run(*plain, "--strategy", "topk", code=1)
    assert "with learned planners" in result.stderr
    assert "nowhere" in run(*start, "--data", "nowhere", code=1).stderr
