"""`train`: what moves, what does not, and that it learns."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch

import sparsiattn
from sparsiattn import InvalidOption
from sparsiattn.patching import unpatch
from sparsiattn.testing import tiny_vit
from sparsiattn.training import Recipe, Stage, train
from sparsiattn.training import losses as losses_module
from tests.support.pictures import Pictures
from tests.support.training_help import (
    DISTIL,
    batches,
    changed,
    epochs,
    losses,
    one_stage,
    patched,
    state,
    two_stages,
)


def test_both_stages_learn_and_each_moves_its_own_weights() -> None:
    model = patched()
    before, moved = state(model), []
    weights = {name: state(model) for name in ("start",)}

    def look(row: dict[str, Any]) -> None:
        if "epoch_loss" in row and row["epoch"] == 1:
            moved.append((row["stage"], changed(model, weights["start"])))
            weights["start"] = state(model)

    result = train(model, batches(), recipe=two_stages(), on_log=look)
    assert moved == [("predictor", {"planners"}), ("backbone", {"backbone"})]
    assert changed(model, before) == {"planners", "backbone"}
    first, second = epochs(result)[:2], epochs(result)[2:]
    assert first[1] < first[0]
    assert second[1] < second[0]
    assert [row["step"] for row in result.history if "loss" in row] == list(range(1, 17))
    assert result.best == result.last
    assert result.last["epoch_loss"] == pytest.approx(sum(losses(result)[-4:]) / 4)


def test_the_model_comes_back_as_it_was_but_trained() -> None:
    model = patched()
    model.train()
    model.blocks[1].eval()  # type: ignore[index,union-attr]
    model.pos_embed.requires_grad_(False)  # type: ignore[union-attr,operator]
    modes = {name: module.training for name, module in model.named_modules()}
    grads = {name: weight.requires_grad for name, weight in model.named_parameters()}
    fixed, numbers = model.pos_embed.clone(), torch.get_rng_state()  # type: ignore[union-attr,operator]
    train(model, batches(2), recipe=two_stages(), epochs=1)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert {name: weight.requires_grad for name, weight in model.named_parameters()} == grads
    assert all(weight.grad is None for weight in model.parameters())
    assert torch.equal(model.pos_embed, fixed)  # type: ignore[arg-type]
    assert torch.equal(torch.get_rng_state(), numbers)
    assert sparsiattn.patch_of(model) is not None


def test_an_unpatched_model_gets_the_recipes_patch() -> None:
    model = tiny_vit()
    recipe = Recipe("token_drop", {"keep": 0.5}, stages=(Stage(epochs=1, **DISTIL),))
    train(model, batches(2), recipe=recipe)
    live = sparsiattn.patch_of(model)
    assert live is not None
    assert live.strategy.keep == 0.5  # type: ignore[attr-defined]
    with pytest.raises(InvalidOption, match=r"the recipe is for TokenDrop.*keep=0\.7"):
        train(model, batches(2), recipe=recipe, **{"options.keep": 0.7})


def test_the_teacher_stays_bit_equal_and_its_state_too() -> None:
    model, teacher = patched(), tiny_vit(embed_dim=96).train()
    before = state(teacher)
    result = train(model, batches(2), recipe=one_stage(kl=1.0, ce=0.0), teacher=teacher)
    assert not changed(teacher, before)
    assert teacher.training
    assert all(weight.requires_grad for weight in teacher.parameters())
    own = train(patched(), batches(2), recipe=one_stage(kl=1.0, ce=0.0))
    assert losses(own)[0] < losses(result)[0]  # nobody is closer than the model itself


def test_the_own_teacher_is_the_model_as_it_was_given() -> None:
    given = unpatch(patched())
    alone = train(patched(), batches(2), recipe=one_stage(**DISTIL, epochs=2))
    taught = train(patched(), batches(2), recipe=one_stage(**DISTIL, epochs=2), teacher=given)
    assert losses(alone) == losses(taught)


def test_the_whole_budget_costs_nothing() -> None:
    model = patched("topk", k=1.0)
    result = train(model, batches(1), recipe=one_stage(kl=1.0, token_mse=1.0, ce=0.0))
    assert losses(result)[0] == pytest.approx(0, abs=1e-6)


def test_accumulation_equals_a_larger_batch() -> None:
    whole = batches(2, 8)
    halves = [(x[i : i + 4], y[i : i + 4]) for x, y in whole for i in (0, 4)]
    models = patched(), patched()
    one = train(models[0], whole, recipe=one_stage(**DISTIL, lr=1e-3))
    two = train(models[1], halves, recipe=one_stage(**DISTIL, lr=1e-3), accumulation=2)
    assert losses(one) == pytest.approx(losses(two), rel=1e-4)
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_averaged_weights_are_the_ones_that_come_back() -> None:
    models = patched(), patched()
    seen: list[dict[str, torch.Tensor]] = [state(models[0])]
    recipe = one_stage(lr=1e-2)
    train(models[0], batches(3), recipe=recipe, on_log=lambda row: seen.append(state(models[0])))
    train(models[1], batches(3), recipe=recipe, ema_decay=0.75)
    expected = seen[0]["head.weight"]
    for weights in seen[1:4]:
        expected = 0.75 * expected + 0.25 * weights["head.weight"]
    torch.testing.assert_close(models[1].head.weight.data, expected)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("strategy", "options"),
    [
        ("hybrid", {"k": 0.3, "keep": 0.5, "only_if_faster": False}),
        ("token_drop", {"keep": "adaptive"}),
    ],
)
def test_tokens_are_matched_where_some_are_gone(strategy: str, options: dict[str, Any]) -> None:
    model = patched(strategy, **options)
    result = train(model, batches(3), recipe=one_stage(**DISTIL, epochs=3, lr=1e-3))
    assert epochs(result)[-1] < epochs(result)[0]
    assert result.history[0]["parts"]["token_mse"] > 0


def test_learned_scores_train_with_the_backbone() -> None:
    model = patched("token_drop", keep=0.1, score="learned", layers=[1])  # half are kept at first
    before = state(model)
    recipe = one_stage(trainable="both", keep_ratio=2.0, lr=1e-2, epochs=3, **DISTIL)
    result = train(model, batches(4), recipe=recipe)
    assert changed(model, before) == {"planners", "backbone"}
    parts = [row["parts"]["keep_ratio"] for row in result.history if "parts" in row]
    assert parts[-1] < parts[0]


def test_learned_scores_alone_leave_running_statistics_alone() -> None:
    model = patched("token_drop", keep=0.5, score="learned", layers=[1])
    model.fc_norm = torch.nn.BatchNorm1d(48)
    before = state(model)
    train(model, batches(2), recipe=one_stage(trainable="planners", kl=0.5, keep_ratio=2.0))
    assert changed(model, before) == {"planners"}


@pytest.mark.slow
def test_keep_rates_shrink_between_epochs() -> None:
    model, seen = tiny_vit(), []
    recipe = Recipe(
        "token_drop", {"keep": 0.5, "layers": [0]}, stages=(Stage(epochs=4, ce=1.0),)
    ).changed({"keep_epochs": (1, 3), "ema_decay": 0.5})

    def look(row: dict[str, Any]) -> None:
        live = sparsiattn.patch_of(model)
        if "epoch_loss" in row and live is not None:
            seen.append(live.strategy.keep)  # type: ignore[attr-defined]

    train(model, batches(1), recipe=recipe, on_log=look)
    assert seen == [1.0, 1.0, 0.75, 0.5]


def test_a_backbone_may_learn_more_slowly_than_its_predictors() -> None:
    options = {"keep": 0.5, "score": "learned", "layers": [1]}
    recipe = one_stage(trainable="both", keep_ratio=2.0, optimizer="sgd", weight_decay=0.0, lr=0.1)
    moves = []
    for scale in (1.0, 0.01):
        model = patched("token_drop", **options)
        before = state(model)
        result = train(model, batches(1), recipe=recipe, backbone_lr_scale=scale, warmup_steps=0)
        assert result.history[0]["lr"] == 0.1
        moves.append({name: t - before[name] for name, t in model.state_dict().items()})
    for name, whole in moves[0].items():
        expected = whole if ".sparsiattn." in name else whole * 0.01
        torch.testing.assert_close(moves[1][name], expected, rtol=1e-3, atol=1e-6)
    assert any(t.any() for name, t in moves[1].items() if ".sparsiattn." not in name)


@pytest.mark.parametrize(
    ("strategy", "options"),
    [
        ("token_drop", {"keep": 0.5, "score": "learned", "layers": [0, 1]}),
        pytest.param(
            "hybrid", {"k": 0.3, "keep": 0.5, "only_if_faster": False}, marks=pytest.mark.slow
        ),
    ],
)
def test_planners_keep_their_weights_where_keep_rates_shrink(
    strategy: str, options: dict[str, Any]
) -> None:
    """The rate is so small that weights that were drawn anew would show."""
    model, keeps = patched(strategy, **options), []
    before = state(model)

    def look(row: dict[str, Any]) -> None:
        live = sparsiattn.patch_of(model)
        assert live is not None
        keeps.append((live.tokens.keep, [runtime.dense for runtime in live.runtimes]))  # type: ignore[union-attr]

    learned = strategy == "token_drop"
    loss = {"ce": 1.0, "keep_ratio": 2.0} if learned else {"ce": 1.0, "reconstruction": 1.0}
    recipe = one_stage(
        trainable="both", optimizer="adamw", lr=1e-6, epochs=3, keep_epochs=(0, 2), **loss
    )
    train(model, batches(1), recipe=recipe, on_log=look)
    assert [keep for keep, _ in keeps[::2]] == [1.0, 0.75, 0.5]
    assert changed(model, before) == {"planners", "backbone"}
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=2e-5)


def test_gradient_checkpointing_changes_no_number() -> None:
    recipe = one_stage(**DISTIL, lr=1e-3)
    options = {"keep": 0.5}
    one = train(patched("token_drop", **options), batches(2), recipe=recipe)
    model = patched("token_drop", **options)
    two = train(model, batches(2), recipe=recipe, grad_checkpointing=True)
    assert losses(one) == pytest.approx(losses(two), rel=1e-6)
    assert model.grad_checkpointing is False


def test_mixed_precision_is_used() -> None:
    one = train(patched(), batches(2), recipe=one_stage(lr=1e-3), mixed_precision="bf16")
    two = train(patched(), batches(2), recipe=one_stage(lr=1e-3))
    assert losses(one) != losses(two)
    assert losses(one) == pytest.approx(losses(two), rel=0.05)


def test_the_best_epoch_is_by_accuracy(tmp_path: Any) -> None:
    model = patched()
    recipe = one_stage(epochs=3, lr=3e-3)
    result = train(model, batches(4), recipe=recipe, eval_data=batches(4), out=tmp_path)
    rows = [row for row in result.history if "top1" in row]
    assert len(rows) == 3
    assert result.best == max(rows, key=lambda row: row["top1"])
    fresh = tiny_vit()
    from safetensors.torch import load_file

    sparsiattn.load(fresh, tmp_path / "best")
    fresh.load_state_dict(load_file(tmp_path / "best" / "model.safetensors"))
    assert sparsiattn.evaluate(fresh, batches(4)).top1 == result.best["top1"]  # type: ignore[index]


def swin() -> Any:
    return timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=32, window_size=4, num_classes=5, depths=(1, 1),
        embed_dim=24, num_heads=(2, 4),
    )  # fmt: skip


def torchvision_vit() -> Any:
    from torchvision.models import VisionTransformer

    return VisionTransformer(32, 8, 2, 3, 48, 96, num_classes=5)


def transformers_vit() -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=96,
        image_size=32, patch_size=8, num_labels=5,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config)


@pytest.mark.parametrize("build", [swin, torchvision_vit, transformers_vit])
def test_other_hosts(build: Any) -> None:
    model = build()
    sparsiattn.patch(model, k=0.5)
    before = state(model)
    checkpointed = {} if build is torchvision_vit else {"grad_checkpointing": True}
    result = train(model, batches(2), recipe=two_stages(), epochs=1, **checkpointed)
    assert changed(model, before) == {"planners", "backbone"}
    assert result.last["epoch_loss"] < 4


def test_mixed_up_labels_are_smoothed_before_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []
    real = losses_module.label_loss

    def label_loss(logits: torch.Tensor, labels: torch.Tensor, smoothing: float) -> torch.Tensor:
        seen.append(labels)
        return real(logits, labels, smoothing)

    monkeypatch.setattr(losses_module, "label_loss", label_loss)
    recipe = one_stage(label_smoothing=0.2).changed({"augment.mixup_alpha": 1.0, "batch_size": 4})
    train(patched(), Pictures(8), recipe=recipe)
    assert len(seen) == 2
    for labels in seen:
        assert labels.shape == (4, 5)
        assert labels.min().item() == pytest.approx(0.2 / 5)
        torch.testing.assert_close(labels.sum(1), torch.ones(4))


def test_a_hybrid_trains_its_predictors_and_then_its_backbone() -> None:
    model = patched("hybrid", k=0.3, keep=0.5, only_if_faster=False)
    before, rows = state(model), list[set[str]]()

    def look(row: dict[str, Any]) -> None:
        if "epoch_loss" in row:
            rows.append(changed(model, before))

    result = train(model, batches(3), recipe=two_stages(), epochs=1, on_log=look)
    assert rows == [{"planners"}, {"planners", "backbone"}]
    assert losses(result)[2] < losses(result)[0]
