"""``sparsiattn show``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

import sparsiattn
from tests.support.commands import model_options, run, small
from tests.support.pictures import picture

SMALL = small()
SHOW = ["show", "vit_tiny_patch16_224"]
OPTIONS = model_options(SMALL)


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    picture(3, 48).save(path)
    return path


def test_json_is_one_document_equal_to_show(photo: Path, tmp_path: Path) -> None:
    torch.manual_seed(7)
    model = timm.create_model("vit_tiny_patch16_224", **SMALL).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    out = [tmp_path / "deep" / "page.html", tmp_path / "keys.png"]
    result = run(
        *SHOW, photo, *OPTIONS, "--checkpoint", tmp_path / "weights.safetensors", "--json",
        "--strategy", "topk", "--k", "0.2", "--layer", "1", "--layer", "blocks.0.*",
        "--head", "2", "--query", "3,4", "--out", out[0], "--out", out[1], "--view", "density",
    )  # fmt: skip
    document = json.loads(result.stdout)
    assert "random weights" not in result.stderr
    sparsiattn.patch(model, "topk", k=0.2)
    shown = sparsiattn.show(model, photo, layers=[0, 1], heads=2, queries=[(3, 4)])
    expected = json.loads(json.dumps(shown.to_dict()))
    assert {name: document[name] for name in expected} == expected
    assert [site["heads"] for site in document["sites"]] == [[2], [2]]
    assert document["name"] == "vit_tiny_patch16_224"
    assert document["out"] == [str(path) for path in out]
    assert out[0].read_text(encoding="utf-8").startswith("<!doctype html>")
    assert out[1].read_bytes().startswith(b"\x89PNG")


def test_without_out_it_prints_and_writes_nothing(
    photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*SHOW, photo, *OPTIONS)
    assert "connectivity k=0.25" in result.stdout
    assert "--out page.html writes a page" in result.stdout
    assert "random weights" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["photo.png"]
    assert "wrote page.html" in run(*SHOW, photo, *OPTIONS, "--out", "page.html").stdout
    assert (tmp_path / "page.html").stat().st_size > 10_000


def test_a_saved_patch_is_shown(photo: Path, tmp_path: Path) -> None:
    model = timm.create_model("vit_tiny_patch16_224", **SMALL)
    sparsiattn.patch(model, "token_drop", keep=0.5, layers=[0]).save(tmp_path / "saved")
    arguments = ["--patch", tmp_path / "saved", "--out", tmp_path / "tokens.svg", "--json"]
    document = json.loads(run(*SHOW, photo, *OPTIONS, *arguments).stdout)
    assert document["strategy"]["name"] == "token_drop"
    assert [block["tokens"] for block in document["tokens"]] == [32, 32]
    assert "</svg>" in (tmp_path / "tokens.svg").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--query", "3"], 2, "ROW,COLUMN is needed, got '3'"),
        (["--query", "3,99"], 1, "not on the grid 8 x 8"),
        (["--layer", "blocks.7.*"], 1, "unknown site 'blocks.7.*'"),
        (["--head", "9"], 1, "heads must be indices in 0..2"),
        (["--out", "keys.gif"], 1, "writes .html"),
        (["--view", "depth"], 1, "unknown view 'depth'"),
        (["--k", "0.1", "--patch", "somewhere"], 2, "--strategy"),
    ],
)
def test_what_is_wrong_is_said(
    photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: int,
    message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    arguments = [*arguments, "--out", "keys.png"] if "--view" in arguments else arguments
    result = run(*SHOW, photo, *OPTIONS, *arguments, code=code)
    assert message in " ".join(result.stderr.replace("│", " ").split())
    assert result.stdout == ""
    assert not list(tmp_path.glob("*.gif")) + list(tmp_path.glob("keys.png"))


def test_no_such_photo_and_no_such_model(tmp_path: Path) -> None:
    missing = run(*SHOW, tmp_path / "none.jpg", *OPTIONS, code=1)
    assert "no image file" in missing.stderr
    wrong = run("show", "vit_tiny_patch16_225", tmp_path / "none.jpg", code=1)
    assert "Did you mean" in wrong.stderr
