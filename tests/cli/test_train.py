"""``sparsiattn train``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

import sparsiattn
from sparsiattn.training import train
from tests.support.commands import NAME, model_options, run, small
from tests.support.pictures import folder
from tests.support.training_help import two_stages

SMALL = small(8)
MODEL = ["train", NAME, *model_options(SMALL)]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return folder(tmp_path / "images")


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    plan = two_stages(strategy="connectivity", options={"k": 0.3}, batch_size=4)
    return plan.save(tmp_path / "own.yaml")


def test_it_equals_train_and_goes_on(data: Path, recipe: Path, tmp_path: Path) -> None:
    torch.manual_seed(7)
    model = timm.create_model("vit_tiny_patch16_224", **SMALL)
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    start = [*MODEL, "--data", data, "--recipe", recipe, "--out", tmp_path / "run", "--json"]
    start += ["--checkpoint", tmp_path / "weights.safetensors", "--eval"]
    start += ["--set", "backbone.lr=0.01", "--set", "epochs=1", "--set", "options.k=0.5"]
    result = run(*start)
    document = json.loads(result.stdout)
    assert "random weights" not in result.stderr
    assert "backbone epoch 0: loss" in result.stderr
    assert document["recipe"]["options"] == {"k": 0.5}
    changes = {"backbone.lr": 0.01, "epochs": 1, "options.k": 0.5}
    expected = train(model, data, recipe=recipe, eval_data=data, **changes).to_dict()
    assert document["history"] == expected["history"]
    assert "top1" in document["best"]
    weights = load_file(tmp_path / "run" / "last" / "model.safetensors")
    assert all(torch.equal(weights[name], t) for name, t in model.state_dict().items())
    again = json.loads(run(*start, "--resume").stdout)
    assert again == document


def test_best_can_be_evaluated(data: Path, recipe: Path, tmp_path: Path) -> None:
    place = tmp_path / "run"
    made = [*MODEL, "--data", data, "--recipe", recipe, "--out", place, "--set", "epochs=1"]
    assert "random weights" in run(*made).stderr
    result = run(
        "eval", *MODEL[1:], "--data", data, "--device", "cpu", "--json", "--checkpoint",
        place / "best" / "model.safetensors", "--patch", place / "best",
    )  # fmt: skip
    assert json.loads(result.stdout)["top1"] is not None


def test_faults_are_one_line(data: Path, tmp_path: Path) -> None:
    for arguments, words in (
        (["--recipe", "evit"], "unknown recipe"),
        (["--set", "predictor.lrr=1"], "Did you mean 'lr'"),
        (["--resume"], "needs out="),
        (["--set", "batch_size=400"], "15 images do not fill one batch"),
    ):
        result = run(*MODEL, "--data", data, *arguments, code=1)
        assert words in result.stderr
        assert "Traceback" not in result.stderr
    run(*MODEL, "--data", data, "--set", "lr", code=2)
    assert issubclass(sparsiattn.TrainingDiverged, sparsiattn.SparsiattnError)
