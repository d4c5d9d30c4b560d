"""``sparsiattn eval``, and the options that commands share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import typer
from safetensors.torch import save_file

import sparsiattn
from sparsiattn.cli.model_command import ModelRequest
from sparsiattn.cli.options import pairs, value_of
from tests.support.commands import NAME, model_options, run, small
from tests.support.pictures import folder

SMALL = small()
MODEL = ["eval", NAME, *model_options(SMALL)]


def small() -> Any:
    torch.manual_seed(7)
    model = timm.create_model("vit_tiny_patch16_224", **SMALL)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return folder(tmp_path / "images")


def test_json_is_one_document_equal_to_evaluate(data: Path, tmp_path: Path) -> None:
    model = small()
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    result = run(
        *MODEL, "--data", data, "--checkpoint", tmp_path / "weights.safetensors", "--json",
        "--strategy", "local", "--k", "3", "-o", "background=None", "--batch-size", "4",
        "--device", "cpu", "--data-option", "mean=[0.4,0.5,0.6]",
    )  # fmt: skip
    document = json.loads(result.stdout)
    assert "random weights" not in result.stderr
    sparsiattn.patch(model, "local", k=3, background=None)
    expected = sparsiattn.evaluate(model, data, augment={"mean": [0.4, 0.5, 0.6]}).to_dict()
    for name in ("images", "top1", "top5", "dense_top1", "dense_top5", "agreement"):
        assert document[name] == expected[name]
    assert document["strategy"]["options"]["k"] == 3
    assert document["name"] == "vit_tiny_patch16_224"
    assert document["images_per_second"] > 0


def test_features_of_a_headless_model_need_no_labels(data: Path) -> None:
    arguments = ["--data", data, "--device", "cpu", "--strategy", "local", "--k", "3"]
    headless = ["--model-option", "num_classes=0"]
    text = run(*MODEL, *headless, *arguments).stdout
    assert "cosine of features: mean" in text
    assert "read     32 x 32 pixels" in text
    document = json.loads(run(*MODEL, *arguments, "--metric", "classes", "--json").stdout)
    assert document["metric"] == "classes"
    assert document["top1"] is None
    assert 0 <= document["similarity_mean"] <= 1
    assert document["preprocessing"]["interpolation"] == "bicubic"
    run(*MODEL, *arguments, "--metric", "top1", code=2)


def test_without_a_strategy_the_model_is_dense(data: Path) -> None:
    result = run(*MODEL, "--data", data, "--limit", 5, "--device", "cpu")
    assert "5 images\ndense" in result.stdout
    assert "patched" not in result.stdout
    assert "random weights" in result.stderr


def test_saved_planners_and_checkpoints_of_patched_models(data: Path, tmp_path: Path) -> None:
    model = small()
    live = sparsiattn.patch(model, "connectivity", k=0.05, background=None)
    with torch.no_grad():  # planners that differ from those that patching would make
        for name, parameter in model.named_parameters():
            if ".sparsiattn." in name:
                parameter.normal_()
    live.save(tmp_path / "planners")
    whole, dense = tmp_path / "whole.safetensors", tmp_path / "dense.safetensors"
    save_file({n: t.contiguous() for n, t in model.state_dict().items()}, whole)
    expected = sparsiattn.evaluate(model, data).to_dict()
    save_file(live.unpatch().state_dict(), dense)
    common = ["--data", data, "--json", "--device", "cpu"]
    strategy = ["--strategy", "connectivity", "--k", "0.05", "-o", "background=None"]
    for how in (
        ["--checkpoint", dense, "--patch", tmp_path / "planners"],
        ["--checkpoint", whole, *strategy],
    ):
        found = json.loads(run(*MODEL, *common, *how).stdout)
        assert {n: found[n] for n in ("top1", "agreement")} == {
            n: expected[n] for n in ("top1", "agreement")
        }
    result = run(*MODEL, *common, "--checkpoint", whole, code=1)
    assert "is of a patched model" in result.stderr
    assert result.stdout == ""
    wrong = run("eval", "test_vit", *common, "--checkpoint", dense, code=1)
    assert "does not fit this VisionTransformer" in wrong.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["eval", "vit_tini_patch16_224"], 1, "Did you mean vit_tiny_patch16_224"),
        (["eval", "test_vit", "--model-option", "no_such=1"], 1, "no_such"),
        (["eval", "test_vit"], 1, "has 5 classes, the model's head 1000"),
        ([*MODEL, "--strategy", "no_such"], 1, "no_such"),
        ([*MODEL, "--strategy", "topk", "-o", "no_such=1"], 1, "no_such"),
        ([*MODEL, "--checkpoint", "no.safetensors"], 1, "cannot be read as weights"),
        ([*MODEL, "--split", "x", "--data-option", "no_such=1"], 1, "no_such"),
        ([*MODEL, "--k", "0.1"], 2, "needs a strategy"),
        ([*MODEL, "--strategy", "topk", "--patch", "x"], 2, "a saved patch"),
        ([*MODEL, "--strategy", "topk", "-o", "x"], 2, "NAME=VALUE"),
        ([*MODEL, "--limit", "0"], 2, "--limit"),
    ],
)
def test_faults_are_one_line(arguments: list[str], code: int, says: str, data: Path) -> None:
    result = run(*arguments, "--data", data, "--device", "cpu", code=code)
    assert says in " ".join(result.stderr.split())
    assert result.stdout == ""
    assert "Traceback" not in result.output


def test_options_are_read_as_python_means_them() -> None:
    texts = ("1", "0.5", "[8, 8]", "None", "true", "False", "adaptive", '"1"')
    expected = [1, 0.5, [8, 8], None, True, False, "adaptive", "1"]
    assert [value_of(text) for text in texts] == expected
    assert pairs(["a=b=c"], "-o") == {"a": "b=c"}
    assert ModelRequest("vit").patch_arguments() is None
    request = ModelRequest("vit", "token_drop", keep="[0.9,0.8,0.7]", option=["fuse=true"])
    arguments = {"strategy": "token_drop", "keep": [0.9, 0.8, 0.7], "fuse": True}
    assert request.patch_arguments() == arguments
    with pytest.raises(typer.BadParameter, match="NAME=VALUE"):
        pairs(["=1"], "-o")
