"""The losses against formulas written down once more."""

from __future__ import annotations

import math

import pytest
import torch

import sparsiattn
from sparsiattn.errors import DataError, InvalidOption
from sparsiattn.patching import unpatch
from sparsiattn.testing import tiny_images, tiny_vit
from sparsiattn.training import Objective, Stage, train
from sparsiattn.training.losses import final_norm, kl_loss, label_loss, token_loss
from sparsiattn.training.reconstruction import site_losses
from tests.support.training_help import batches, losses, one_stage, patched, state


def test_labels_as_indices_smoothed_and_as_shares() -> None:
    logits, labels = torch.randn(4, 5), torch.tensor([0, 4, 2, 2])
    rows = [[x - math.log(sum(math.exp(y) for y in row)) for x in row] for row in logits.tolist()]
    plain = -sum(row[i] for row, i in zip(rows, labels.tolist(), strict=True)) / 4
    even = -sum(sum(row) / 5 for row in rows) / 4
    assert label_loss(logits, labels, 0.0).item() == pytest.approx(plain, rel=1e-5)
    smooth = label_loss(logits, labels, 0.1).item()
    assert smooth == pytest.approx(0.9 * plain + 0.1 * even, rel=1e-5)
    shares = torch.nn.functional.one_hot(labels, 5) * 0.9 + 0.02
    assert label_loss(logits, shares, 0.3).item() == pytest.approx(smooth, rel=1e-5)


@pytest.mark.parametrize("label", [-1, 5])
def test_labels_beyond_the_head_are_refused(label: int) -> None:
    with pytest.raises(DataError, match=f"label {label}"):
        label_loss(torch.randn(2, 5), torch.tensor([0, label]), 0.0)


@pytest.mark.parametrize("labels", [torch.zeros(2, 4), torch.zeros(2), torch.zeros(3).long()])
def test_labels_of_another_shape_are_refused(labels: torch.Tensor) -> None:
    with pytest.raises(DataError, match="labels must be class indices"):
        label_loss(torch.randn(2, 5), labels, 0.0)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_kl_is_the_sum_over_classes_and_the_mean_over_images(temperature: float) -> None:
    student, teacher = torch.randn(2, 3, 5).double().unbind(0)
    p, q = ((x / temperature).softmax(-1) for x in (teacher, student))
    expected = (p * (p / q).log()).sum() / 3 * temperature**2
    found = kl_loss(student, teacher, temperature)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


def test_reconstruction_is_what_calibrate_minimises() -> None:
    model = patched()
    live = sparsiattn.patch_of(model)
    assert live is not None
    images = tiny_images()
    seen = []

    def look(site: object, planner: object, inputs: sparsiattn.AttentionInputs) -> None:
        exact = (inputs.q @ inputs.k.mT * inputs.scale).softmax(-1)[..., inputs.prefix :, :]
        scores = planner.scores(inputs)  # type: ignore[attr-defined]
        shares = scores / scores.sum(-1, keepdim=True)
        seen.append((exact * (exact / shares).log()).sum(-1).mean())

    with torch.no_grad(), live.observing(look):
        model(images)
    torch.testing.assert_close(torch.stack(site_losses(live, images)), torch.stack(seen))
    stage = Stage(trainable="planners", epochs=1, reconstruction=1.0)
    found = Objective(model, stage, None)(images, torch.zeros(3).long())
    torch.testing.assert_close(found["reconstruction"], torch.stack(seen).mean())


@pytest.mark.parametrize(
    ("strategy", "options"),
    [
        ("token_drop", {"keep": 0.5}),
        ("token_drop", {"keep": 0.5, "fuse": True}),
        ("token_drop", {"keep": "adaptive"}),
        ("token_merge", {"r": 8}),
        ("hybrid", {"k": 0.3, "keep": 0.5, "only_if_faster": False}),
    ],
)
def test_tokens_are_compared_with_those_they_come_from(strategy: str, options: dict) -> None:  # type: ignore[type-arg]
    model, images = patched(strategy, **options), tiny_images()
    live = sparsiattn.patch_of(model)
    assert live is not None
    seen: list[torch.Tensor] = []
    hook = model.norm.register_forward_hook(lambda m, a, out: seen.append(out))  # type: ignore[union-attr,operator,arg-type]
    with torch.no_grad():
        with live.disabled():
            model(images)
        model(images)
    hook.remove()
    dense, short = seen
    errors = []
    for image, row in enumerate(live.source().tolist()):
        for token, place in enumerate(row):
            if token >= 1 and place >= 0:
                error = (short[image, place] - dense[image, token]) ** 2
                errors.append(error.mean().item())
    assert len(errors) < 3 * 64 or strategy == "token_merge" or options.get("fuse")
    found = token_loss(live, short, dense).item()
    assert found == pytest.approx(sum(errors) / len(errors), rel=1e-4)


def test_a_policy_counts_only_tokens_that_are_kept() -> None:
    model, images = patched("token_drop", keep=0.5, score="learned", layers=[0]), tiny_images()
    live = sparsiattn.patch_of(model)
    assert live is not None
    model.train()
    model(images)
    policy = live.last_pass[0].policy.detach()
    assert 0 < policy.sum() < policy.numel()
    tokens, targets = torch.randn(2, 3, 65, 48).unbind(0)
    errors = (tokens - targets).square().mean(-1)[:, 1:]
    expected = (errors * policy).sum() / policy.sum()
    torch.testing.assert_close(token_loss(live, tokens, targets), expected)


def test_the_model_with_its_patch_disabled_equals_a_copy_as_teacher() -> None:
    model = patched()
    copy = unpatch(patched())
    stage = Stage(trainable="planners", epochs=1, kl=1.0, token_mse=1.0)
    images, labels = batches(1)[0]
    own = Objective(model, stage, None)(images, labels)
    other = Objective(model, stage, copy)(images, labels)
    assert own.keys() == other.keys() == {"kl", "token_mse"}
    assert all(torch.equal(own[name], other[name]) for name in own)


def test_while_the_backbone_rests_no_copy_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    model = patched("token_drop", keep=0.3, score="learned", layers=[0])
    before = state(model)

    def refuse(model: object) -> None:
        raise AssertionError("a copy was made")

    monkeypatch.setattr("sparsiattn.training.trainer.deepcopy", refuse)
    recipe = one_stage(trainable="planners", ce=0.0, kl=1.0, token_mse=1.0, keep_ratio=1.0)
    result = train(model, batches(2), recipe=recipe)
    assert losses(result)[0] > 0
    assert torch.equal(before["head.weight"], model.state_dict()["head.weight"])
    with pytest.raises(AssertionError, match="a copy"):
        train(model, batches(2), recipe=one_stage(kl=1.0))


def test_a_host_without_a_final_norm_is_told_so() -> None:
    model = tiny_vit()
    assert final_norm(model) is model.norm
    with pytest.raises(InvalidOption, match="set token_mse=0"):
        final_norm(torch.nn.Linear(1, 1))


def test_a_teacher_of_other_classes_is_refused() -> None:
    teacher = tiny_vit(num_classes=7)
    with pytest.raises(InvalidOption, match="the same classes"):
        train(patched(), batches(1), recipe=one_stage(kl=1.0), teacher=teacher)
