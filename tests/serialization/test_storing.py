"""Saved patches under kills and damage, with their host, and on the Hub."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import safetensors.torch
import timm
import torch
from torch import nn

import sparsiattn
from sparsiattn import MismatchedPatch, SparsiattnError, patch
from sparsiattn.serialization import files, origin_of
from sparsiattn.serialization.files import CONFIG, HOST, WEIGHTS
from tests.support import environment, zoo

SMALL: dict[str, Any] = {"img_size": 32, "patch_size": 4, "num_classes": 5, "depth": 2}
SMALL |= {"embed_dim": 48, "num_heads": 3}


def budget(folder: Path) -> Any:
    """k of the first site, after the patch was loaded whole."""
    live = sparsiattn.load(zoo.build("vit"), folder)
    return live.runtimes[0].strategy.k  # type: ignore[attr-defined]


@pytest.fixture
def model() -> nn.Module:
    return zoo.build("vit")


class Killed(BaseException):
    """Not to be caught on the way."""


CASES = [("whole", False), ("nothing", True), ("patch", True), ("nothing", False), ("whole", True)]


@pytest.mark.parametrize(("first", "whole"), zoo.slow_but(CASES[:2], *CASES[2:]))
def test_a_kill_at_any_moment(
    model: nn.Module, tmp_path: Path, first: str, whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped before each call that changes the folder: what is read is the old or the new."""
    outcomes, step = [], 0
    while not outcomes or outcomes[-1] != "done":
        folder = tmp_path / str(step)
        if first != "nothing":
            with patch(model, "connectivity", k=3) as live:
                live.save(folder, include_model=True) if first == "whole" else live.save(folder)
        with patch(model, "connectivity", k=5) as live, monkeypatch.context() as m:
            live.runtimes[0].planner.self_weight.data.add_(1)
            _stop_at(step, m)
            try:
                live.save(folder, include_model=True) if whole else live.save(folder)
                done = True
            except Killed:
                done = False
        found = None
        with nullcontext() if first != "nothing" else suppress(MismatchedPatch):
            found = budget(folder)
        outcomes.append("done" if done else found)
        if found == 5:
            with patch(model, "connectivity", k=9) as live:
                live.save(folder)
            assert budget(folder) == 9
            assert sorted(p.name for p in folder.iterdir()) == sorted([CONFIG, WEIGHTS])
        step += 1
    old = None if first == "nothing" else 3
    kills = outcomes[:-1]
    assert kills == [old] * kills.count(old) + [5] * kills.count(5)
    assert old in kills
    assert 5 in kills


def _stop_at(step: int, m: pytest.MonkeyPatch) -> None:
    """Raise instead of the ``step``-th change to the folder."""
    left = iter(range(step))

    def before(real: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if next(left, None) is None:
                raise Killed
            return real(*args, **kwargs)

        return call

    save_file = before(safetensors.torch.save_file)
    m.setattr(files.safetensors.torch, "save_file", save_file)
    for name in ("write_text", "replace", "unlink"):
        m.setattr(Path, name, before(getattr(Path, name)))


@pytest.mark.slow
def test_kill_9_during_saves(tmp_path: Path) -> None:
    code = (
        "import sys, sparsiattn\n"
        "from tests.support import zoo\n"
        "live = sparsiattn.patch(zoo.build('vit'), 'connectivity', k=0.25)\n"
        "n = 0\n"
        "while True:\n"
        "    n += 1\n"
        "    live.save(sys.argv[1], include_model=True) if n % 2 else live.save(sys.argv[1])\n"
        "    print(n, flush=True)\n"
    )
    for turn in range(5):
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE,
            env=environment(),
        )  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline()
        time.sleep(0.05 + 0.03 * turn)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        assert budget(tmp_path) == 0.25


class TestDamage:
    @pytest.fixture
    def saved(self, model: nn.Module, tmp_path: Path) -> Path:
        with patch(model, "connectivity", k=5) as live:
            return live.save(tmp_path / "saved", include_model=True)

    @pytest.mark.parametrize("name", [WEIGHTS, HOST])
    def test_a_flipped_bit(self, model: nn.Module, saved: Path, name: str) -> None:
        content = bytearray((saved / name).read_bytes())
        content[-1] ^= 1
        (saved / name).write_bytes(content)
        with pytest.raises(MismatchedPatch, match="checksum"):
            sparsiattn.load(model, saved)
        assert sparsiattn.patch_of(model) is None

    def test_an_edited_config(self, model: nn.Module, saved: Path) -> None:
        config = json.loads((saved / CONFIG).read_text())
        config["sites"]["blocks.0.attn"]["k"] = 6
        (saved / CONFIG).write_text(json.dumps(config))
        with pytest.raises(MismatchedPatch, match="changed after it was saved"):
            sparsiattn.load(model, saved)

    def test_files_of_two_patches(self, model: nn.Module, saved: Path, tmp_path: Path) -> None:
        with patch(model, "connectivity", k=5) as live:
            for weight in live.runtimes[0].planner.parameters():
                weight.data.add_(1)
            other = live.save(tmp_path / "other")
        shutil.copy(other / WEIGHTS, saved / WEIGHTS)
        with pytest.raises(MismatchedPatch, match="checksum"):
            sparsiattn.load(model, saved)

    @pytest.mark.parametrize(
        "change",
        [
            {"origin": {"library": "os", "name": "system", "options": {}}},
            {"origin": {"library": "timm", "name": "vit", "options": {"checkpoint_path": "x"}}},
            {"origin": "timm"},
            {"files": {WEIGHTS: "0", "../../etc/passwd": "0"}},
        ],
        ids=str,
    )
    def test_a_config_that_asks_for_more(self, saved: Path, change: dict[str, Any]) -> None:
        config = json.loads((saved / CONFIG).read_text())
        if "files" in change:
            change["files"][WEIGHTS] = config["files"][WEIGHTS]
        text = json.dumps(files.with_checksum({**config, **change}))
        (saved / CONFIG).write_text(text)
        with pytest.raises(MismatchedPatch):
            sparsiattn.from_pretrained(saved)

    def test_format_1_is_still_read(self, model: nn.Module, saved: Path) -> None:
        config = json.loads((saved / CONFIG).read_text())
        for key in ("sparsiattn", "origin", "schedule", "files", "seal"):
            del config[key]
        (saved / CONFIG).write_text(json.dumps({**config, "format": 1}))
        assert budget(saved) == 5

    def test_a_full_disk(
        self, model: nn.Module, saved: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(*_: Any) -> None:
            raise OSError(28, "No space left on device")

        with patch(model, "topk", k=2) as live, monkeypatch.context() as m:
            m.setattr("sparsiattn.kernels.atomic_io.sync", full)
            with pytest.raises(sparsiattn.CheckpointNotWritten, match="No space left"):
                live.save(saved)
        assert budget(saved) == 5


def test_the_config_says_what_was_saved(model: nn.Module, tmp_path: Path) -> None:
    with patch(model, "topk", k=[3, 9]) as live:
        live.save(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    assert config["sparsiattn"] == sparsiattn.__version__
    assert config["schedule"] == {"k": {"blocks.0.attn": 3, "blocks.1.attn": 9}}
    with patch(model, "topk", schedule=config["schedule"]) as live:
        assert [r.strategy.k for r in live.runtimes] == [3, 9]  # type: ignore[attr-defined]


def _hf() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        image_size=32, patch_size=4, hidden_size=48, num_hidden_layers=2, num_attention_heads=3,
        intermediate_size=96, num_labels=5,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config)  # type: ignore[no-any-return]


HOSTS: dict[str, Any] = {
    "timm": lambda: timm.create_model("test_vit", num_classes=7, img_size=96, in_chans=1),
    "timm, created here": lambda: sparsiattn.create_model("vit_tiny_patch16_224", **SMALL),
    "transformers": _hf,
}


@pytest.mark.parametrize("kind", HOSTS)
def test_a_whole_checkpoint_stands_alone(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = HOSTS[kind]().eval()
    sides = 96 if kind == "timm" else 32
    x = torch.randn(2, 1 if kind == "timm" else 3, sides, sides)
    with torch.no_grad(), patch(model, "connectivity", k=0.25) as live:
        wanted = _logits(model(x))
        live.save(tmp_path, include_model=True)
    again = sparsiattn.from_pretrained(tmp_path)
    assert again.model is not model
    with torch.no_grad():
        assert torch.equal(_logits(again.model(x)), wanted)
        again.unpatch()
        assert torch.equal(_logits(again.model(x)), _logits(model(x)))
    state = safetensors.torch.load_file(tmp_path / HOST)
    assert set(state) == set(model.state_dict())


def _logits(out: Any) -> torch.Tensor:
    return getattr(out, "logits", out)  # type: ignore[no-any-return]


def test_origin_of_torchvision_is_known_where_create_model_made_it() -> None:
    models = pytest.importorskip("torchvision.models")
    with torch.device("meta"):
        assert origin_of(models.vit_b_32(num_classes=9)) is None
        model = sparsiattn.create_model("tv:vit_b_32", num_classes=9)
    origin = {"library": "torchvision", "name": "vit_b_32", "options": {"num_classes": 9}}
    assert origin_of(model) == origin


def test_origin_is_dropped_where_the_model_was_changed() -> None:
    model = sparsiattn.create_model("vit_tiny_patch16_224", **SMALL)
    assert origin_of(model) is not None
    model.head = nn.Linear(48, 3)
    assert origin_of(model) is None


def test_origin_is_dropped_where_an_attribute_differs() -> None:
    model: Any = sparsiattn.create_model("vit_tiny_patch16_224", **SMALL)
    model.blocks[0].attn.num_heads = 6
    assert origin_of(model) is None


def test_from_pretrained_wants_weights_or_a_word(tmp_path: Path) -> None:
    model = sparsiattn.create_model("vit_tiny_patch16_224", **SMALL)
    with patch(model, "topk", k=5) as live:
        live.save(tmp_path)
    with pytest.raises(sparsiattn.InvalidOption, match="pretrained=False"):
        sparsiattn.from_pretrained(tmp_path)
    assert sparsiattn.from_pretrained(tmp_path, pretrained=False).model is not model
    live = sparsiattn.from_pretrained(tmp_path, model)
    assert live.model is model


class FakeHub:
    """Repositories in a folder, behind the two calls that are used."""

    def __init__(self, root: Path) -> None:
        self.root, self.calls = root, []  # type: ignore[var-annotated]

    def api(self, token: Any = None) -> Any:
        return SimpleNamespace(create_repo=self.create, upload_folder=self.upload)

    def create(self, repo_id: str, **options: Any) -> None:
        self.calls.append(("create", options))
        (self.root / repo_id).mkdir(parents=True, exist_ok=options["exist_ok"])

    def upload(self, repo_id: str, folder_path: str, **options: Any) -> Any:
        self.calls.append(("upload", options))
        shutil.copytree(folder_path, self.root / repo_id, dirs_exist_ok=True)
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")

    def download(self, repo_id: str, **options: Any) -> str:
        if not (self.root / repo_id).is_dir():
            raise huggingface_hub.errors.LocalEntryNotFoundError("not in the cache")
        return str(self.root / repo_id)


def test_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = FakeHub(tmp_path)
    monkeypatch.setattr(huggingface_hub, "HfApi", hub.api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.download)
    model = sparsiattn.create_model("vit_tiny_patch16_224", **SMALL).eval()
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad(), patch(model, k=0.25) as live:
        wanted = model(x)
        address = live.push_to_hub("me/vit", whole=True, private=True)
    assert address == "https://hub/me/vit/commit/1"
    assert hub.calls[0] == ("create", {"private": True, "exist_ok": True})
    card = (tmp_path / "me" / "vit" / "README.md").read_text()
    assert "library_name: sparsiattn" in card
    with torch.no_grad():
        assert torch.equal(sparsiattn.from_pretrained("me/vit").model(x), wanted)
    with pytest.raises(sparsiattn.UnknownName, match="no saved patch 'me/other'"):
        sparsiattn.from_pretrained("me/other")


def test_the_hub_out_of_reach(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", fail)
    with patch(model, "topk", k=3) as live, pytest.raises(SparsiattnError, match="no network"):
        live.push_to_hub("me/vit")
