"""``--device``, ``--dtype`` and ``--workers`` reach the model, and a wrong one is one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

import sparsiattn
from sparsiattn.cli import app
from sparsiattn.cli import images as cli_images
from sparsiattn.cli.options import device_of, place_of
from tests.support.commands import NAME, model_options, run, small
from tests.support.pictures import folder, picture

COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
MODEL = [NAME, *model_options(small(8))]


WITH_DEVICE = [
    name for name, one in COMMANDS.items() if "device" in {option.name for option in one.params}
]


def needed(name: str, tmp_path: Path) -> list[object]:
    """What a command cannot do without."""
    model: list[object] = [] if name == "tune" else [*MODEL]
    data = ["--data", tmp_path / "images"]
    extra: dict[str, list[object]] = {
        "show": [tmp_path / "photo.png"],
        "search": [*data, "--macs", "0.9"],
        "recommend": [*data, "--speedup", "1.5"],
        "eval": data,
        "train": data,
        "calibrate": [*data, "--out", tmp_path / "out"],
        "export": ["--out", tmp_path / "vit.pt2"],
    }
    return [name, *model, *extra.get(name, [])]


@pytest.mark.parametrize("name", WITH_DEVICE)
@pytest.mark.parametrize("device", ["cuda:99", "tpu-7"])
def test_a_device_that_is_not_there_is_one_line(name: str, device: str, tmp_path: Path) -> None:
    result = run(*needed(name, tmp_path), "--device", device, code=1)
    (line,) = result.stderr.splitlines()  # nothing is built before, so nothing is said before
    assert line.startswith("error: --device must be one that torch can use here (cpu")
    assert repr(device) in line
    assert result.stdout == ""
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", WITH_DEVICE)
def test_a_wrong_dtype_is_a_usage_error(name: str, tmp_path: Path) -> None:
    result = run(*needed(name, tmp_path), "--dtype", "int8", code=2)
    assert "is needed, got 'int8'" in result.stderr


def test_devices() -> None:
    assert device_of("cpu") == torch.device("cpu")
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert device_of(None).type == expected
    assert place_of("cpu", "float16") == {"device": device_of("cpu"), "dtype": torch.float16}
    with pytest.raises(sparsiattn.InvalidOption, match="computes nothing"):
        device_of("meta")


def test_half_precision_where_a_model_runs(tmp_path: Path) -> None:
    folder(tmp_path / "images")
    half = ("--dtype", "bfloat16", "--device", "cpu")
    found = json.loads(run("bench", *MODEL, "--k", "0.5", "--rounds", 1, *half, "--json").stdout)
    assert (found["dtype"], found["device"]) == ("bfloat16", "cpu")
    picture(3, 48).save(tmp_path / "photo.png")
    page = tmp_path / "page.html"
    run("show", *MODEL, tmp_path / "photo.png", "--out", page, *half)
    assert page.stat().st_size > 10_000
    program = tmp_path / "vit.pt2"
    run("export", *MODEL, "--out", program, "--tolerance", "0.1", *half)
    images = torch.zeros(3, 3, 32, 32, dtype=torch.bfloat16)
    assert torch.export.load(program).module()(images).dtype == torch.bfloat16


def test_half_precision_where_images_are_read(tmp_path: Path) -> None:
    data = ("--data", folder(tmp_path / "images"), "--dtype", "bfloat16", "--device", "cpu")
    out = tmp_path / "fitted"
    calibrated = run(
        "calibrate", *MODEL, *data, "--steps", 2, "--batch-size", 4, "--k", "0.5", "-o",
        "scores=predictor", "--out", out,
    )  # fmt: skip
    assert f"in 2 steps; wrote {out}" in calibrated.stdout
    searched = run(
        "search", *MODEL, *data, "--strategy", "token_drop", "--macs", "0.9", "--trials", 1,
        "--images", 4, "--json",
    )  # fmt: skip
    assert json.loads(searched.stdout)["found"]["macs"] > 0
    found = run("recommend", *MODEL, *data, "--quality", "0", "--budget", "0.3", "--images", 4)
    assert "answers kept" in found.stdout


def test_workers_read_the_same_images(tmp_path: Path) -> None:
    data = str(folder(tmp_path / "images"))
    model = sparsiattn.create_model(NAME, **small(8))
    batches = [
        list(cli_images.unlabelled(data, model, None, workers, batch_size=4)) for workers in (0, 2)
    ]
    assert len(batches[0]) > 1
    for one, other in zip(*batches, strict=True):
        assert torch.equal(one, other)


def test_workers_are_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def loader(*args: Any, workers: int, **options: Any) -> Any:
        seen.append(workers)
        raise sparsiattn.DataError("enough")

    monkeypatch.setattr("sparsiattn.training.data.loader", loader)
    for name in ("calibrate", "search", "recommend"):
        run(*needed(name, tmp_path), "--workers", 3, "--device", "cpu", code=1)
    assert seen == [3, 3, 3]


def test_train_changes_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plans: list[Any] = []

    def train(*args: Any, recipe: Any, **options: Any) -> Any:
        plans.append(recipe)
        raise sparsiattn.DataError("enough")

    monkeypatch.setattr("sparsiattn.train", train)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")  # so that it is put back
    arguments = ("--workers", 2, "--dtype", "bfloat16", "--device", "cpu")
    run(*needed("train", tmp_path), *arguments, code=1)
    run(*needed("train", tmp_path), code=1)
    changed, plain = plans
    assert (changed.workers, changed.mixed_precision) == (2, "bf16")
    assert (plain.workers, plain.mixed_precision) == (
        sparsiattn.Recipe.load("sparsifiner_deit_small").workers,
        sparsiattn.Recipe.load("sparsifiner_deit_small").mixed_precision,
    )
