"""What every command takes as MODEL, and what all commands have in common."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import typer
from typer.testing import CliRunner

import sparsiattn
from sparsiattn.cli import app
from tests.support.commands import model_options, run, small
from tests.support.pictures import folder

COMMANDS = sorted(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
SMALL = small()


def profiled(*arguments: object) -> dict[str, Any]:
    return json.loads(run("profile", *arguments, "--json").stdout)  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        image_size=32, patch_size=4, hidden_size=48, num_hidden_layers=2, num_attention_heads=3,
        intermediate_size=96, num_labels=5,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("hf")
    torch.manual_seed(1)  # not the seed every test begins with
    transformers.ViTForImageClassification(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A patch alone, of a model that no name gives without options."""
    torch.manual_seed(0)
    model = sparsiattn.create_model("vit_tiny_patch16_224", **SMALL)
    with sparsiattn.patch(model, "topk", k=7) as live:
        return live.save(tmp_path_factory.mktemp("patch"))


class TestNames:
    def test_transformers_folder(self, hf_folder: Path) -> None:
        found = profiled(f"hf:{hf_folder}", "--strategy", "local", "--k", "10")
        assert found["tokens"] == [65, 65]
        assert found["mhsa_macs"] < found["mhsa_macs_dense"]

    def test_transformers_pretrained_are_the_weights_of_the_folder(self, hf_folder: Path) -> None:
        weights = [
            sparsiattn.create_model(f"hf:{hf_folder}", pretrained=True).classifier.weight
            for _ in range(2)
        ]
        assert torch.equal(*weights)
        random = sparsiattn.create_model(f"hf:{hf_folder}").classifier.weight
        assert not torch.equal(random, weights[0])

    def test_transformers_without_a_classifier(self, tmp_path: Path) -> None:
        transformers = pytest.importorskip("transformers")
        transformers.SiglipVisionConfig(
            image_size=32, patch_size=8, hidden_size=48, num_hidden_layers=2,
            num_attention_heads=3, intermediate_size=96,
        ).save_pretrained(tmp_path)  # fmt: skip
        found = run("inspect", f"hf:{tmp_path}", "--strategy", "local", "--json")
        assert len(json.loads(found.stdout)["sites"]) >= 2

    def test_torchvision(self) -> None:
        found = run("inspect", "tv:vit_b_32", "--strategy", "local", "--json")
        assert len(json.loads(found.stdout)["sites"]) == 12

    def test_constructor_that_looks_at_values(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """As timm's ViT did until 1.0.22: it cannot be built without memory."""
        make = timm.create_model

        def looking(*args: Any, **kwargs: Any) -> Any:
            torch.linspace(0, 0.1, 2)[0].item()
            return make(*args, **kwargs)

        monkeypatch.setattr(timm, "create_model", looking)
        found = run("inspect", "deit_tiny_patch16_224", "--strategy", "local", "--json")
        assert len(json.loads(found.stdout)["sites"]) == 12

    def test_saved_patch(self, saved: Path) -> None:
        found = profiled(saved)
        assert found["strategy"] == "topk"
        assert found["tokens"] == [65, 65]
        document = json.loads(run("bench", saved, "--rounds", "1", "--json").stdout)
        assert document["strategy"] == "topk"
        assert document["report"]["sites"][0]["k"] == 7
        assert json.loads(run("inspect", saved, "--json").stdout)["sites"]

    def test_saved_patch_where_images_are_read(self, saved: Path, tmp_path: Path) -> None:
        """`recommend` takes the host alone: what it finds is a patch."""
        data = ("--data", folder(tmp_path / "images"), "--device", "cpu")
        found = json.loads(run("eval", saved, *data, "--limit", 4, "--json").stdout)
        assert found["strategy"]["options"]["k"] == 7
        goal = ("--quality", "0", "--budget", "0.3", "--images", 4)
        assert json.loads(run("recommend", saved, *data, *goal, "--json").stdout)["table"]

    def test_whole_checkpoint_brings_its_weights(self, tmp_path: Path) -> None:
        torch.manual_seed(3)
        model = sparsiattn.create_model("vit_tiny_patch16_224", **SMALL)
        with sparsiattn.patch(model, "topk", k=7) as live:
            live.save(tmp_path, include_model=True)
        again = sparsiattn.create_model(str(tmp_path))
        assert torch.equal(again.head.weight, model.head.weight)
        assert "random weights" not in run("profile", tmp_path, "--json").stderr

    def test_saved_patch_without_a_name(self, tmp_path: Path) -> None:
        """Neither noted nor to be guessed: depth 2 is no option that the model itself tells."""
        model = timm.create_model("vit_tiny_patch16_224", **SMALL)
        with sparsiattn.patch(model, "topk", k=7) as live:
            live.save(tmp_path)
        result = run("profile", tmp_path, code=1)
        assert "sparsiattn.load(model, folder)" in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("deit_smal_patch16_224", "deit_small_patch16_224"),
        ("vit_b_33", "tv:vit_b_32"),
        ("tv:vit_b_33", "tv:vit_b_32"),
        ("hf:./no_such_folder", "no_such_folder"),
        ("hf:nobody/no-such-model", "no-such-model"),
    ],
)
def test_unknown_names(name: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    result = run("profile", name, code=1)
    assert says in " ".join(result.output.split())


def test_close_matches_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models--google--vit-base-patch16-224").mkdir()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    result = run("profile", "vit-base-patch16-225", code=1)
    assert "hf:google/vit-base-patch16-224" in " ".join(result.output.split())


@pytest.mark.parametrize(
    "extra", [("--strategy", "local"), ("--patch", "elsewhere"), ("--k", "0.5")], ids=str
)
def test_a_saved_patch_has_its_own_options(saved: Path, extra: tuple[str, ...]) -> None:
    run("profile", saved, *extra, code=2)


def test_a_folder_of_something_else(tmp_path: Path) -> None:
    assert "no saved patch" in " ".join(run("profile", tmp_path, code=1).output.split())


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_json_and_an_example(name: str) -> None:
    command = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
    assert "--json" in {text for option in command.params for text in option.opts}
    assert f"sparsiattn {name}" in " ".join((command.help or "").split())
    assert run(name, "--help").output
    assert run(name, "--no-such-option", code=2)


def test_bench_as_json_is_one_document(tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    result = run(
        "bench", "test_vit", "--strategy", "local", "--rounds", "1", "--json", "--out", out
    )
    assert json.loads(result.stdout) == json.loads(out.read_text())


def completed(words: str, at: int) -> list[str]:
    """What bash gets to choose from."""
    given = {"_SPARSIATTN_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(at)}
    result = CliRunner().invoke(app, [], prog_name="sparsiattn", env=given)
    return result.stdout.split()  # type: ignore[no-any-return]


def test_completion() -> None:
    assert completed("sparsiattn ex", 1) == ["export"]
    assert set(completed("sparsiattn ", 1)) == set(COMMANDS)
    assert "--strategy" in completed("sparsiattn export --str", 2)
    assert completed("sparsiattn list str", 2) == ["strategies"]
    assert completed("sparsiattn recommend m --metric f", 4) == ["features"]
    assert "--k" in completed("sparsiattn bench m --", 3)
    assert "--k" not in completed("sparsiattn bench m --k 0.1 --", 5)  # given already
    assert "--option" in completed("sparsiattn bench m --option a=b --", 5)  # may be repeated


def test_completion_script(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    result = CliRunner().invoke(app, ["--show-completion", "bash"], prog_name="sparsiattn")
    assert "_SPARSIATTN_COMPLETE=complete_bash" in result.stdout


def test_export(tmp_path: Path, saved: Path) -> None:
    out = tmp_path / "made" / "vit.pt2"
    found = json.loads(run("export", saved, "--out", out, "--json").stdout)
    assert found["format"] == "pt2"  # by the suffix
    assert found["strategy"] == "topk"
    assert found["max_difference"] <= 1e-4
    program = torch.export.load(out).module()
    assert program(torch.zeros(5, 3, 32, 32)).shape == (5, 5)


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("--format", "tflite"), 2, "onnx, pt2, aoti"),
        (("--format", "onnx", "--out", "vit.pt2"), 2, "must end in .onnx"),
        (("--out", "vit.tflite"), 2, "must end in .pt2"),
        (("--strategy", "token_drop", "--keep", "adaptive"), 1, "a different number of tokens"),
    ],
)
def test_export_refuses(saved: Path, tmp_path: Path, arguments: Any, code: int, says: str) -> None:
    options = model_options(SMALL)
    given = ("vit_tiny_patch16_224", *options, "--format", "pt2", "--out", tmp_path / "a.pt2")
    result = run("export", *given, *arguments, code=code)
    assert says in " ".join(result.output.split())
    assert not list(tmp_path.iterdir())
