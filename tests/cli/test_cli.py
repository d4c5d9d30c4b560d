"""The command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

import sparsiattn
from sparsiattn.analysis.benchmark import tuning
from sparsiattn.analysis.benchmark.tuning_cases import Case
from sparsiattn.cli import app
from sparsiattn.cli.console import readable_errors
from sparsiattn.kernels import cost
from sparsiattn.kernels import tuning_cache as tuningfile


def test_list_as_json_is_one_document() -> None:
    result = CliRunner().invoke(app, ["list", "--json"])
    assert result.exit_code == 0
    listing = json.loads(result.stdout)
    assert {row["name"] for row in listing["strategies"]} >= {"connectivity", "topk"}
    status = {row["name"]: row["status"] for row in listing["kernels"]}
    assert status["gather"] == "usable"
    assert status["varlen"] in ("usable", "needs a CUDA device")


def test_list_as_tables_and_as_a_module() -> None:
    command = [sys.executable, "-m", "sparsiattn", "list"]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for word in ("strategies", "kernels", "backbones", "plugins", "connectivity", "timm_swin"):
        assert word in out


def test_list_fits_a_screen_and_says_what_matters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    out = CliRunner().invoke(app, ["list"]).stdout
    infos = sparsiattn.list_strategies()
    assert len(out.splitlines()) <= len(infos) + 10
    rows = {line.split()[1]: line.split() for line in out.splitlines() if line.startswith("│")}
    for name, info in infos.items():
        kind = {"attention": "keys"}.get(info.kind, info.kind)
        training = "yes" if info.needs_training else "no"
        exact = "no" if info.inexact_reason else "yes"
        assert [rows[name][i] for i in (3, 5, 7)] == [kind, training, exact]
    assert "usable" not in out
    if not torch.cuda.is_available():
        assert "triton (needs a CUDA device)" in out


@pytest.mark.parametrize("kind", ["strategies", "kernels", "backbones", "plugins"])
def test_list_of_one_kind_has_summaries(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    whole = json.loads(CliRunner().invoke(app, ["list", "--json"]).stdout)
    part = json.loads(CliRunner().invoke(app, ["list", kind, "--json"]).stdout)
    assert part == {kind: whole[kind]}
    out = CliRunner().invoke(app, ["list", kind]).stdout
    for row in whole[kind]:
        assert row["summary"] in out


@pytest.mark.parametrize(
    "arguments",
    [
        ["bench", "no_model"],
        ["search", "no_model", "--data", "nowhere", "--macs", "0.5"],
        ["calibrate", "no_model", "--data", "nowhere"],
        ["export", "no_model", "--format", "onnx"],
        ["show", "no_model", "nothing.jpg"],
    ],
)
def test_a_file_that_cannot_be_written_is_refused_before_the_work(
    arguments: list[str], tmp_path: Path
) -> None:
    """Also before the model is looked for."""
    (tmp_path / "file").touch()
    inside = str(tmp_path / "file" / "x.onnx")
    result = CliRunner().invoke(app, [*arguments, "--out", inside])
    assert (result.exit_code, result.stdout) == (1, "")
    (line,) = result.stderr.splitlines()
    assert line == f"error: --out must be where you may write, which {tmp_path / 'file'} is not"


def test_faults_of_files_are_one_line() -> None:
    with pytest.raises(typer.Exit), readable_errors():
        raise PermissionError(13, "Permission denied", "/locked/bench.json")
    with pytest.raises(BrokenPipeError), readable_errors():
        raise BrokenPipeError  # a closed pipe is no fault


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["bench", "test_vit", "--out", str(tmp_path)])
    assert result.stderr == f"error: --out must be a file, got the folder {tmp_path}\n"


def test_no_command_shows_help_and_a_wrong_one_is_a_usage_error() -> None:
    assert "list" in CliRunner().invoke(app, []).output
    assert CliRunner().invoke(app, ["no-such-command"]).exit_code == 2


def test_tune_prints_expected_beside_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "QUICK", (Case(16, 0.25, heads=2, dim=8),))
    monkeypatch.setenv("SPARSIATTN_CACHE", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "160")
    try:
        options = ["tune", "--device", "cpu", "--dtype", "float32", "--budget", "30"]
        result = CliRunner().invoke(app, options)
        assert result.exit_code == 0, result.output
        fastest, pays, file = result.stdout.splitlines()  # and nothing else
        assert fastest.startswith("fastest here, float32: ")
        assert pays.startswith("sparse attention pays ")
        assert file.endswith(str(tmp_path / "tuning.json"))
        assert (tmp_path / "tuning.json").is_file()
        table = CliRunner().invoke(app, [*options, "--verbose"]).stdout
        for word in ("measured", "expected", "gather", "planning", "tuning.json"):
            assert word in table
        again = json.loads(CliRunner().invoke(app, [*options, "--json"]).stdout)
        assert again["path"] == str(tmp_path / "tuning.json")
        assert {row["kernel"] for row in again["rows"]} >= {"dense", "planning", "gather"}
        assert len(again["verdict"]) == 3
    finally:
        monkeypatch.undo()
        tuningfile.forget()
        cost.reload()


def test_bench_prints_tables_and_writes_json(tmp_path: Path) -> None:
    out = tmp_path / "new" / "bench.json"
    arguments = ["bench", "test_vit", "--strategy", "local", "--k", "20", "--rounds", "1"]
    options = ["--batch-size", "2", "--dtype", "float32", "--device", "cpu", "--out", str(out)]
    result = CliRunner().invoke(app, [*arguments, *options])
    assert result.exit_code == 0, result.output
    for word in ("dense / patched", "quartiles", "measured", "blocks.0.attn"):
        assert word in result.output
    document = json.loads(out.read_text())
    assert document["name"] == "test_vit"
    assert document["input_shape"] == [2, 3, 160, 160]
    assert document["report"]["sites"][0]["k"] == 20
    assert document["ratio"] > 0
    (note,) = [line for line in result.stderr.splitlines() if "expected speed" in line]
    assert note.startswith("local on 6 sites of VisionTransformer: ")


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["bench", "no_such_model"], 1, "no_such_model"),
        (["bench", "test_vit", "--strategy", "no_such"], 1, "no_such"),
        (["bench", "test_vit", "--k", "many"], 2, "many"),
        (["bench", "test_vit", "--dtype", "int8"], 2, "int8"),
        (["bench", "test_vit", "--image-size", "7"], 1, "(1, 3, 7, 7)"),
        (["bench", "resnet18", "--image-size", "64"], 1, "img_size"),
        (["bench", "test_vit", "--device", "gpu"], 1, "--device must be"),
        (["tune", "--device", "mps"], 1, "mps"),
    ],
)
def test_faults_are_one_line(arguments: list[str], code: int, says: str) -> None:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == code
    assert says in result.output
    assert "Traceback" not in result.output
