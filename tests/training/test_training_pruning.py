"""Sparse then Prune: penalties on attention weights, and pruning that a stage holds."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import sparsiattn
from sparsiattn import InvalidOption
from sparsiattn.patching import unpatch
from sparsiattn.testing import tiny_images, tiny_vit
from sparsiattn.training import Objective, Recipe, Stage, train
from sparsiattn.training.penalties import entropy, log_penalty
from sparsiattn.training.pruning import candidates
from tests.support.training_help import batches, losses, one_stage, patched, state


class Killed(Exception):
    pass


def attention_by_hand(model: nn.Module, images: torch.Tensor) -> list[torch.Tensor]:
    """Weights ``[B, H, N, N]`` of both blocks of the tiny ViT, written down once more."""
    found, x = [], model.norm_pre(model._pos_embed(model.patch_embed(images)))  # type: ignore
    for block in model.blocks:  # type: ignore[union-attr]
        y = block.norm1(x)
        q, k, _ = block.attn.qkv(y).unflatten(-1, (3, 3, -1)).permute(2, 0, 3, 1, 4)
        found.append((q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1))
        x = block(x)
    return found


@pytest.mark.parametrize("layers", ["all", "last"])
@pytest.mark.parametrize("strategy", ["dense", "connectivity"])
def test_penalties_are_of_the_dense_attention(strategy: str, layers: str) -> None:
    model = tiny_vit()
    images, labels = batches(1)[0]
    rows = attention_by_hand(model, images)
    rows = rows[-1:] if layers == "last" else rows
    logs = sum((1 + a * a).log().mean() for a in rows) / len(rows)
    bits = sum(-(a * a.log()).sum(-1).mean() for a in rows) / len(rows)
    sparsiattn.patch(model, strategy, **({} if strategy == "dense" else {"k": 0.2}))
    stage = Stage(
        epochs=1, ce=1.0, attention_log=0.5, attention_entropy=0.1, attention_layers=layers
    )
    parts = Objective(model, stage, None)(images, labels)
    assert list(parts) == ["ce", "attention_log", "attention_entropy"]
    torch.testing.assert_close(parts["attention_log"], logs, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(parts["attention_entropy"], bits, rtol=1e-4, atol=1e-6)
    with torch.no_grad():  # the labels' loss is that of the patched model
        sparse = nn.functional.cross_entropy(model(images), labels)
    torch.testing.assert_close(parts["ce"], sparse, rtol=1e-5, atol=1e-6)


def test_what_each_penalty_wants() -> None:
    """The published one is least where attention is even: that is said, and so is the other."""
    rows = torch.randn(2, 3, 9, 9).softmax(-1)
    even, single = torch.full_like(rows, 1 / 9), torch.eye(9).expand(2, 3, 9, 9)
    assert log_penalty(even) < log_penalty(rows) < log_penalty(single)
    assert entropy(single) == 0 < entropy(rows) < entropy(even)
    assert entropy(even).item() == pytest.approx(math.log(9))
    assert log_penalty(single).item() == pytest.approx(math.log(2) / 9)


@pytest.mark.parametrize(("loss", "falls"), [("attention_entropy", True), ("attention_log", False)])
def test_training_moves_attention_where_the_penalty_wants_it(loss: str, falls: bool) -> None:
    model, images = tiny_vit(), tiny_images()

    def spread() -> float:
        with torch.no_grad():
            return float(sum(entropy(rows) for rows in attention_by_hand(model, images)))

    before = spread()
    sparsiattn.patch(model, "dense")
    train(model, batches(2), recipe=one_stage(ce=0.0, **{loss: 1.0}, lr=1e-3, epochs=3))
    unpatch(model)
    assert (spread() < before) == falls


def test_penalties_and_checkpointing_do_not_go_together() -> None:
    with pytest.raises(InvalidOption, match="attention_entropy cannot be combined with"):
        Stage(epochs=1, attention_entropy=1.0, grad_checkpointing=True)


def flat(model: nn.Module, norms: bool) -> torch.Tensor:
    return torch.cat([weight.detach().flatten() for _, weight in candidates(model, norms=norms)])


@pytest.mark.parametrize("norms", [True, False])
def test_the_smallest_weights_of_the_whole_model_are_zero(norms: bool) -> None:
    model = tiny_vit()
    every = flat(model, norms)
    wanted = every.abs() > every.abs().sort().values[round(0.4 * len(every)) - 1]
    sparsiattn.patch(model, "topk", k=0.5)
    before, names = state(model), list(model.state_dict())
    train(model, batches(2), recipe=one_stage(prune=0.4, prune_norms=norms, weight_decay=0.1))
    assert torch.equal(flat(model, norms) != 0, wanted), "chosen globally, and held"
    assert list(model.state_dict()) == names, "no parameter has another name"
    kept = {name for name, _ in candidates(model, norms=norms)}
    assert ("blocks.0.norm1.weight" in kept) == norms
    for name in set(before) - kept:
        assert (model.state_dict()[name] != 0).any() or not (before[name] != 0).any(), name
    assert not any(weight._backward_hooks for weight in model.parameters())


def test_planners_are_not_pruned_and_shared_weights_count_once() -> None:
    model = patched()
    model.head.weight = model.blocks[0].attn.proj.weight  # type: ignore[union-attr]
    names = [name for name, _ in candidates(model, norms=True)]
    assert not any(".sparsiattn." in name for name in names)
    assert "head.weight" not in names
    assert "blocks.0.attn.proj.weight" in names
    with pytest.raises(InvalidOption, match="no linear or convolution layer"):
        candidates(nn.Identity(), norms=True)


def test_moving_averages_are_pruned_too() -> None:
    model = patched("topk", k=0.5)
    train(model, batches(2), recipe=one_stage(prune=0.5, ema_decay=0.5))
    every = flat(model, True)
    assert int((every == 0).sum()) == round(0.5 * len(every))


def test_a_killed_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    plan = one_stage(epochs=2, prune=0.3, optimizer="momentum", attention_entropy=0.1)
    whole = train(dense(), batches(3), recipe=plan)

    def kill(row: dict[str, Any]) -> None:
        if row.get("step") == 4 and "loss" in row:
            raise Killed

    with pytest.raises(Killed):
        train(dense(), batches(3), recipe=plan, out=tmp_path, checkpoint_steps=1, on_log=kill)
    model = dense()
    rest = train(model, batches(3), recipe=plan, out=tmp_path, checkpoint_steps=1)
    assert losses(rest) == losses(whole)
    every = flat(model, True)
    assert int((every == 0).sum()) == round(0.3 * len(every))


def dense() -> nn.Module:
    model = tiny_vit()
    sparsiattn.patch(model, "dense")
    return model


def test_the_published_recipe_says_what_is_ours() -> None:
    recipe = Recipe.load("sparse_then_prune_vit_base")
    sparse, pruned = recipe.stages
    assert sparse.penalties == ["attention_log"]
    assert (sparse.attention_log, sparse.attention_layers) == (0.01, "last")
    assert (pruned.prune, pruned.prune_norms) == (0.1, True)
