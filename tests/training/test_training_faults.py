"""Bad input of training: one clear error each, nothing lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import sparsiattn
from sparsiattn import DataError, InvalidOption, TrainingDiverged
from sparsiattn.testing import tiny_vit
from sparsiattn.training import Recipe, Stage, train
from sparsiattn.training import losses as losses_module
from sparsiattn.training.checkpoint import load_weights
from tests.support.training_help import batches, changed, one_stage, patched, state, two_stages


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_at_once(
    bad: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, real = [], losses_module.kl_loss

    def kl_loss(*args: Any) -> torch.Tensor:
        calls.append(1)
        return real(*args) * (bad if len(calls) == 6 else 1.0)

    monkeypatch.setattr(losses_module, "kl_loss", kl_loss)
    model, seen = patched(), list[dict[str, torch.Tensor]]()
    with pytest.raises(TrainingDiverged) as caught:
        train(
            model, batches(4), recipe=one_stage(epochs=2, kl=0.5), out=tmp_path,
            on_log=lambda row: seen.append(state(model)),
        )  # fmt: skip
    words = str(caught.value)
    assert "step 6 (stage 'train', epoch 1)" in words
    assert f"kl is {bad}" in words
    assert "ce is" not in words
    assert f"the last good checkpoint, of step 4, is in {tmp_path / 'last'}" in words
    assert isinstance(caught.value, FloatingPointError)
    assert not changed(model, seen[-1])  # the weights of the step before
    other = patched()
    load_weights(other, tmp_path / "last" / "model.safetensors")
    assert not changed(other, seen[4])
    assert all(weight.grad is None for weight in model.parameters())


def test_a_gradient_that_is_not_finite_stops_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    model = patched()
    before = state(model)
    model.head.weight.register_hook(lambda grad: grad * float("nan"))  # type: ignore[union-attr,operator]
    with pytest.raises(TrainingDiverged, match=r"step 1 .*the norm of the gradient is nan"):
        train(model, batches(1), recipe=one_stage())
    assert not changed(model, before)


@pytest.mark.parametrize(
    ("strategy", "options", "stage", "words"),
    [
        ("topk", {"k": 0.5}, {"trainable": "planners", "reconstruction": 1.0}, "'topk' has none"),
        ("topk", {"k": 0.5}, {"trainable": "planners", "ce": 1.0}, "has no learned planners"),
        ("connectivity", {}, {"reconstruction": 1.0}, "trainable is 'backbone'"),
        ("connectivity", {}, {"trainable": "planners", "ce": 1.0}, "give them no gradient"),
        ("connectivity", {}, {"ce": 1.0, "keep_ratio": 1.0}, "keep_ratio needs learned"),
        ("connectivity", {}, {"ce": 1.0, "keep_epochs": (0, 1)}, "Only token strategies"),
        ("token_drop", {"keep": 20}, {"ce": 1.0, "keep_epochs": (0, 1)}, "keep as a share"),
        ("topk", {"k": 0.5}, {"ce": 1.0, "optimizer": "best"}, "cannot create the optimizer"),
    ],
)
def test_stages_that_cannot_train(strategy: str, options: Any, stage: Any, words: str) -> None:
    model = patched(strategy, **options)
    before = state(model)
    with pytest.raises(InvalidOption, match=words):
        train(model, batches(1), recipe=Recipe(stages=(Stage(epochs=1, **stage),)))
    assert not changed(model, before)


def test_a_fault_of_a_later_stage_is_found_before_the_first() -> None:
    rows: list[Any] = []
    with pytest.raises(InvalidOption, match="warm-up of stage 'backbone' must be shorter"):
        train(
            patched(), batches(2), recipe=two_stages(), epochs=1, on_log=rows.append,
            **{"backbone.warmup_epochs": 3},
        )  # fmt: skip
    assert rows == []


def test_frozen_backbones_have_nothing_to_train() -> None:
    model = patched()
    for weight in model.parameters():
        weight.requires_grad_(False)
    with pytest.raises(InvalidOption, match="all of its weights are frozen"):
        train(model, batches(1), recipe=one_stage())


def test_no_patch_and_no_strategy() -> None:
    with pytest.raises(InvalidOption, match=r"patch\(model, ...\) first"):
        train(tiny_vit(), batches(1), recipe=one_stage())


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ([], "an epoch has 0"),
        (None, "data must be a path"),
        ("/nowhere/at/all", "no such folder or file"),
        ([(torch.zeros(2, 3, 32, 32), torch.tensor([1, 5]))], "label 5.*5 classes"),
        ([(torch.zeros(2, 3, 32, 32), torch.tensor([1, -1]))], "label -1"),
        ([torch.zeros(2, 3, 32, 32)], "every batch must be"),
    ],
)
def test_data_that_does_not_fit(data: Any, words: str) -> None:
    model = tiny_vit()
    before = state(model)
    with pytest.raises(DataError, match=words):
        train(model, data, recipe=Recipe("topk", {"k": 0.5}, stages=(Stage(epochs=1, ce=1.0),)))
    assert sparsiattn.patch_of(model) is None  # it was not patched before either
    assert not changed(model, before)


def test_a_generator_cannot_be_gone_through_twice() -> None:
    data = (batch for batch in batches(2))
    with pytest.raises(InvalidOption, match="set steps"):
        train(patched(), data, recipe=one_stage())
    with pytest.raises(DataError, match="not as a generator"):
        train(patched(), data, recipe=one_stage(epochs=None, steps=3))


def test_too_few_batches_to_accumulate() -> None:
    with pytest.raises(DataError, match="accumulation=3"):
        train(patched(), batches(2), recipe=one_stage(), accumulation=3)


def test_tensorboard_writes_beside_the_log(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    with pytest.raises(InvalidOption, match="needs out="):
        train(patched(), batches(1), recipe=one_stage(), tensorboard=True)
    train(patched(), batches(1), recipe=one_stage(), tensorboard=True, out=tmp_path)
    assert [path.name[:6] for path in (tmp_path / "tensorboard").iterdir()] == ["events"]


def test_checkpointing_needs_the_models_own_switch() -> None:
    model = patched()
    bare = torch.nn.Sequential(model)
    from sparsiattn.training.trainable import checkpointing

    with (
        pytest.raises(InvalidOption, match="has no gradient checkpointing"),
        checkpointing(bare, True),
    ):
        pass
