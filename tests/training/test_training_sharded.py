"""Fully sharded training: what is refused, and that two processes train as one does."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sparsiattn import InvalidOption
from sparsiattn.training import sharding, train
from tests.support import ROOT, environment
from tests.support.pictures import Pictures
from tests.support.sharded_run import PLAN, WARMDOWN
from tests.support.training_help import losses, one_stage, patched

RUN = ROOT / "tests" / "support" / "sharded_run.py"
FSDP = {
    "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_TRANSFORMER_CLS_TO_WRAP": "Block",
}  # fmt: skip


def accelerator(kind: str = "FSDP", **plugin: Any) -> Any:
    fields = {"fsdp_version": 2, "auto_wrap_policy": None, "activation_checkpointing": False}
    state = SimpleNamespace(fsdp_plugin=SimpleNamespace(**{**fields, **plugin}))
    return SimpleNamespace(distributed_type=kind, state=state)


def by_size() -> None: ...


by_size.__name__ = "size_based_auto_wrap_policy"


@pytest.mark.parametrize(
    ("found", "change", "words"),
    [
        (accelerator("DEEPSPEED"), {}, "set up for DEEPSPEED.*ACCELERATE_USE_FSDP=true"),
        (accelerator(fsdp_version=1), {}, "FSDP version 1.*--fsdp_version 2"),
        (accelerator(auto_wrap_policy=by_size), {}, "TRANSFORMER_BASED_WRAP"),
        (accelerator(activation_checkpointing=True), {}, "grad_checkpointing: true"),
        (accelerator(), {"mixed_precision": "fp16"}, "use 'bf16'"),
        (accelerator(), {"ema_decay": 0.9}, r"stages \['train'\] average weights"),
    ],
)
def test_what_cannot_be_is_refused(found: Any, change: Any, words: str) -> None:
    with pytest.raises(InvalidOption, match=words):
        sharding.set_up(found, one_stage().changed(change))


def launch(folder: Path, how: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["--standalone", str(RUN), str(folder), how]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=580, env=environment(**FSDP)
    )


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where sharded runs were: one whole, one killed at its sixth update."""
    folder = tmp_path_factory.mktemp("sharded")
    done = launch(folder, "kill")
    assert "Signal 9" in done.stderr, done.stderr[-3000:]
    assert (folder / "variants.json").exists(), done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def alone() -> tuple[torch.nn.Module, Any]:
    """The same in one process, which is not sharded."""
    model = patched()
    return model, train(model, Pictures(16), recipe=PLAN, eval_data=Pictures(6))


def rows(folder: Path) -> list[Any]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def assert_alike(folder: Path, model: torch.nn.Module) -> None:
    from safetensors.torch import load_file

    weights = load_file(folder / "last" / "model.safetensors")
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-2, atol=1e-3)


@pytest.mark.slow
def test_two_sharded_processes_equal_one(killed: Path, alone: Any) -> None:
    found = rows(killed / "whole")
    model, one = alone
    assert [row.keys() for row in found] == [row.keys() for row in one.history]
    assert [row["loss"] for row in found if "loss" in row] == pytest.approx(losses(one), rel=1e-3)
    for there, here in zip(found, one.history, strict=True):
        assert there.get("top1") == here.get("top1")
    assert_alike(killed / "whole", model)
    assert (killed / "whole" / "best" / "model.safetensors").exists()


@pytest.mark.slow
def test_a_sharded_run_goes_on_without_shards(killed: Path, alone: Any, tmp_path: Path) -> None:
    shutil.copytree(killed / "killed", tmp_path / "copy")
    model = patched()
    result = train(
        model, Pictures(16), recipe=PLAN, eval_data=Pictures(6), out=tmp_path / "copy", resume=True
    )
    assert losses(result) == pytest.approx(losses(alone[1]), rel=1e-3)
    assert_alike(tmp_path / "copy", alone[0])


@pytest.mark.slow
def test_a_killed_sharded_run_goes_on_bit_for_bit(killed: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    shutil.copytree(killed / "killed", tmp_path / "killed")
    done = launch(tmp_path, "resume")
    assert done.returncode == 0, done.stderr[-3000:]
    assert rows(tmp_path / "killed") == rows(killed / "whole")
    one, two = (
        load_file(folder / "last" / "model.safetensors")
        for folder in (tmp_path / "killed", killed / "whole")
    )
    assert all(torch.equal(one[name], two[name]) for name in two)


@pytest.mark.slow
def test_other_recipes_in_shards(killed: Path, alone: Any) -> None:
    found = json.loads((killed / "variants.json").read_text())
    dropped = train(patched("token_drop", keep=0.5), Pictures(16), recipe=WARMDOWN)
    assert found["warmdown"] == pytest.approx(losses(dropped), rel=1e-3)
    assert found["bf16"] == pytest.approx(losses(alone[1]), rel=0.05)
    assert found["bf16"] != losses(alone[1])
    assert [len(found[name]) for name in ("scores", "own_teacher")] == [3, 2]
    assert all(0 < loss < 10 for loss in (*found["scores"], *found["own_teacher"]))
