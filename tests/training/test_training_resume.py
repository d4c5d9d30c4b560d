"""Going on after a kill, and checkpoints that are whole or not there."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import sparsiattn
from sparsiattn import CheckpointNotWritten, InvalidOption, MismatchedCheckpoint
from sparsiattn.kernels import atomic_io
from sparsiattn.testing import tiny_vit
from sparsiattn.training import Recipe, Stage, loader, train
from sparsiattn.training import checkpoint as saved
from sparsiattn.training.run_folder import RunFolder
from tests.support import environment
from tests.support.pictures import Pictures
from tests.support.training_help import (
    DISTIL,
    batches,
    changed,
    losses,
    one_stage,
    patched,
    state,
    two_stages,
)


class Killed(BaseException):
    """Not an error that anything on the way would handle."""


def kill_at(step: int) -> Any:
    def look(row: dict[str, Any]) -> None:
        if "loss" in row and row["step"] == step:
            raise Killed

    return look


def shuffled() -> Any:
    """A user's own loader, whose order comes from torch's global random numbers."""
    images, labels = (torch.cat(part) for part in zip(*batches(3), strict=True))
    data = torch.utils.data.TensorDataset(images, labels)
    return torch.utils.data.DataLoader(data, batch_size=4, shuffle=True)


def ours() -> Any:
    return Pictures(count=12)


def test_a_kill_between_the_row_of_an_epoch_and_its_checkpoint(tmp_path: Path) -> None:
    """The epoch ends again, and has one row."""
    plan = two_stages(checkpoint_steps=1, batch_size=4)
    whole = train(patched(), batches(3), recipe=plan)
    for epoch in range(2):

        def look(row: dict[str, Any], epoch: int = epoch) -> None:
            if "epoch_loss" in row and row["epoch"] == epoch:
                raise Killed

        with pytest.raises(Killed):
            train(patched(), batches(3), recipe=plan, out=tmp_path, on_log=look)
    resumed = train(patched(), batches(3), recipe=plan, out=tmp_path)
    assert resumed.history == whole.history
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == whole.history


HOST = {"proj_drop_rate": 0.2, "drop_path_rate": 0.2}


@pytest.mark.parametrize(
    ("data", "steps"),
    [
        (shuffled, [6]),
        (ours, [8]),
        pytest.param(shuffled, [2, 6, 11], marks=pytest.mark.slow),
    ],
    ids=["the user's loader", "ours", "again and again"],
)
def test_the_curve_is_the_same_bit_for_bit(data: Any, steps: list[int], tmp_path: Path) -> None:
    """Killed again and again: in the first stage, at its end, within epochs of the second."""
    plan = two_stages(checkpoint_steps=2, batch_size=4).changed({"backbone.ema_decay": 0.9})
    models = patched(host=HOST), patched(host=HOST)
    whole = train(models[0], data(), recipe=plan)
    for step in steps:
        with pytest.raises(Killed):
            train(patched(host=HOST), data(), recipe=plan, out=tmp_path, on_log=kill_at(step))
    again = train(models[1], data(), recipe=plan, out=tmp_path)
    assert len(losses(whole)) == 12
    assert again.history == whole.history
    assert (again.best, again.last) == (whole.best, whole.last)
    assert not changed(models[1], state(models[0]))
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == whole.history


@pytest.mark.parametrize(
    "data",
    [pytest.param(data, marks=pytest.mark.slow) for data in (shuffled, ours)],
    ids=["the user's loader", "ours"],
)
def test_a_kill_after_any_checkpoint(
    data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One update further each time: also after the last of an epoch, of a stage, of all."""
    plan = two_stages(checkpoint_steps=1, batch_size=4)
    whole = train(patched(), data(), recipe=plan)
    keep, kills = RunFolder.save, 0

    def killed(self: RunFolder, *args: Any, **kwargs: Any) -> None:
        keep(self, *args, **kwargs)
        raise Killed

    with monkeypatch.context() as during:
        during.setattr(RunFolder, "save", killed)
        while True:
            try:
                again = train(patched(), data(), recipe=plan, out=tmp_path)
                break
            except Killed:
                kills += 1
                assert kills < 30
    assert kills >= 10
    assert again.history == whole.history


def test_rows_from_before_the_first_checkpoint_are_made_again(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        train(patched(), batches(), recipe=one_stage(), out=tmp_path, on_log=kill_at(3))
    result = train(patched(), batches(), recipe=one_stage(), out=tmp_path)
    assert [row["step"] for row in result.history if "loss" in row] == [1, 2, 3, 4]


def test_a_finished_run_only_gives_its_weights(tmp_path: Path) -> None:
    models = patched(), patched()
    plan = one_stage(ema_decay=0.5)
    one = train(models[0], batches(), recipe=plan, out=tmp_path)
    two = train(models[1], batches(), recipe=plan, out=tmp_path, resume=True)
    assert one.to_dict() == two.to_dict()
    assert not changed(models[1], state(models[0]))


@pytest.mark.parametrize("learned", [pytest.param(False, marks=pytest.mark.slow), True])
def test_keep_rates_go_on_where_they_were(learned: bool, tmp_path: Path) -> None:
    """Averaged weights, planners and both rates of the optimizer go over to every new patch."""
    more: dict[str, Any] = {}
    if learned:
        more = {"trainable": "both", "keep_ratio": 2.0, "backbone_lr_scale": 0.1, "ema_decay": 0.5}
    stage = Stage(epochs=3, keep_epochs=(0, 2), **DISTIL, **more)
    options = {"keep": 0.5, "score": "learned" if learned else "cls"}
    plan = Recipe("token_drop", options, stages=(stage,), checkpoint_steps=1)
    models = tiny_vit(), tiny_vit()
    whole = train(models[0], batches(2), recipe=plan)
    with pytest.raises(Killed):
        train(tiny_vit(), batches(2), recipe=plan, out=tmp_path, on_log=kill_at(4))
    assert train(models[1], batches(2), recipe=plan, out=tmp_path).history == whole.history
    assert not changed(models[1], state(models[0]))


@pytest.mark.parametrize(
    ("model", "change", "words"),
    [
        (lambda: patched(k=0.3), {}, "another strategy: options.k 0.2 there, 0.3 here"),
        (lambda: patched("topk"), {}, "another strategy"),
        (lambda: patched(host={"depth": 3}), {}, "another model: sha256"),
        (patched, {"lr": 0.5}, r"another recipe: stages\[0\].lr"),
        (patched, {"seed": 9}, "another recipe: seed 0 there, 9 here"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(
    model: Any, change: Any, words: str, tmp_path: Path
) -> None:
    train(patched(), batches(1), recipe=one_stage(), out=tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    other = model()
    weights = state(other)
    with pytest.raises(MismatchedCheckpoint, match=words):
        train(other, batches(1), recipe=one_stage(), out=tmp_path, **change)
    assert not changed(other, weights)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_what_changes_no_number_may_differ(tmp_path: Path) -> None:
    train(patched(), batches(1), recipe=one_stage(), out=tmp_path)
    train(patched(), batches(1), recipe=one_stage(), out=tmp_path, resume=True, checkpoint_steps=7)


def test_resume_that_cannot_be_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InvalidOption, match="needs out="):
        train(patched(), batches(1), recipe=one_stage(), resume=True)
    with pytest.raises(MismatchedCheckpoint, match="no checkpoint to resume"):
        train(patched(), batches(1), recipe=one_stage(), out=tmp_path, resume=True)
    with pytest.raises(InvalidOption, match="must be 'auto', True or False"):
        train(patched(), batches(1), recipe=one_stage(), resume="yes")
    train(patched(), batches(1), recipe=one_stage(), out=tmp_path)
    with pytest.raises(InvalidOption, match="resume=False would overwrite"):
        train(patched(), batches(1), recipe=one_stage(), out=tmp_path, resume=False)


@pytest.mark.parametrize("name", ["state.json", "model.safetensors", "optimizer.pt"])
def test_a_broken_checkpoint_is_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        train(
            patched(), batches(4), recipe=one_stage(), out=tmp_path, checkpoint_steps=1,
            on_log=kill_at(3),
        )  # fmt: skip
    (tmp_path / "last" / name).write_bytes(b"{")
    with pytest.raises(MismatchedCheckpoint, match=name.replace(".", r"\.")):
        train(patched(), batches(4), recipe=one_stage(), out=tmp_path, checkpoint_steps=1)


def full(*args: Any, **kwargs: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("module", "function"),
    [
        (saved, "save_weights"),
        pytest.param(saved, "save_state", marks=pytest.mark.slow),
        (atomic_io, "sync"),
    ],
)
def test_a_full_disk_leaves_the_last_checkpoint_whole(
    module: Any, function: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = one_stage(epochs=2)
    whole = train(patched(), batches(2), recipe=plan)

    def fill(row: dict[str, Any]) -> None:
        if row["step"] == 3:
            monkeypatch.setattr(module, function, full)

    model = patched()
    with pytest.raises(CheckpointNotWritten, match=r"No space left on device.*are intact"):
        train(model, batches(2), recipe=plan, out=tmp_path, on_log=fill)
    monkeypatch.undo()
    assert sparsiattn.patch_of(model) is not None
    assert not list(tmp_path.glob("*.new"))
    assert saved.load_weights(patched(), tmp_path / "last" / "model.safetensors") is None
    assert train(patched(), batches(2), recipe=plan, out=tmp_path).history == whole.history


def test_a_log_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(row: dict[str, Any]) -> None:
        real = Path.open
        monkeypatch.setattr(
            Path, "open", lambda p, *a, **k: full() if p.name == "log.jsonl" else real(p, *a, **k)
        )

    with pytest.raises(CheckpointNotWritten, match=r"log\.jsonl cannot be written.*No space left"):
        train(patched(), batches(2), recipe=one_stage(), out=tmp_path, on_log=fill)


def test_a_log_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").mkdir()
    with pytest.raises(CheckpointNotWritten, match=r"log\.jsonl cannot be read"):
        train(patched(), batches(2), recipe=one_stage(), out=tmp_path)


def test_a_kill_between_two_renames_loses_nothing(tmp_path: Path) -> None:
    place = tmp_path / "last"
    saved.write(place, lambda folder: (folder / "a").write_text("1") and None)
    place.rename(tmp_path / "last.old")
    (tmp_path / "last.new").mkdir()
    atomic_io.recover_folder(place)
    assert (place / "a").read_text() == "1"
    saved.write(place, lambda folder: (folder / "b").write_text("2") and None)
    assert [path.name for path in place.iterdir()] == ["b"]
    assert [path.name for path in tmp_path.iterdir()] == ["last"]


def test_skipping_reads_no_image_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = one_stage().changed({"batch_size": 4})
    with pytest.raises(Killed):
        train(patched(), ours(), recipe=plan, out=tmp_path, checkpoint_steps=1, on_log=kill_at(3))
    read: list[int] = []
    get = Pictures.__getitem__
    monkeypatch.setattr(Pictures, "__getitem__", lambda s, i: (read.append(i), get(s, i))[1])
    result = train(patched(), ours(), recipe=plan, out=tmp_path, checkpoint_steps=1)
    assert len(losses(result)) == 3
    assert len(read) == 4
    assert len(loader(ours(), tiny_vit(), batch_size=4, training=True)) == 3  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_killed_process_goes_on(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from tests.support.training_help import *\n"
        "from sparsiattn.training import train\n"
        "plan = two_stages(checkpoint_steps=1)\n"
        "train(patched(), batches(8), recipe=plan, out=sys.argv[1])\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    process = subprocess.Popen(command, env=environment())
    log = tmp_path / "run" / "log.jsonl"
    while not (log.exists() and len(log.read_text().splitlines()) >= 12):
        assert process.poll() is None
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    plan = two_stages(checkpoint_steps=1)
    again = train(patched(), batches(8), recipe=plan, out=tmp_path / "run", resume=True)
    assert again.history == train(patched(), batches(8), recipe=plan).history
