"""Recipes: files, changes, and what is wrong with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch

import sparsiattn
from sparsiattn import InvalidOption
from sparsiattn.errors import UnknownName
from sparsiattn.training import Recipe, Stage, recipes
from sparsiattn.training.stage_run import lengths, make_schedule

STAGE = {"name": "one", "epochs": 1, "ce": 1.0}


def test_all_papers_are_there() -> None:
    hosts = (
        "deit_tiny",
        "deit_small",
        "deit_base",
        "lvvit_small",
        "swin_tiny",
        "hybrid_deit_small",
    )
    names = {f"sparsifiner_{host}" for host in hosts}
    others = {"evit_deit_small", "dynamicvit_deit_small", "sparse_then_prune_vit_base"}
    assert set(recipes()) == names | others


@pytest.mark.parametrize("name", recipes())
def test_it_says_what_was_published_and_goes_through_files(name: str, tmp_path: Path) -> None:
    recipe = Recipe.load(name)
    assert recipe.published["note"] == "published, not re-run here"
    assert recipe.published["paper"]
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    for suffix in ("yaml", "json"):
        path = recipe.save(tmp_path / f"own.{suffix}")
        assert Recipe.load(path) == recipe
    for column in ("mhsa", "top1", "macs"):
        values = recipe.published.get(column)
        count = recipe.published.get("keep", recipe.published.get("keep_tokens"))
        assert values is None or len(values) == len(count)


LARGER = ("sparsifiner_deit_small", "sparsifiner_deit_base")  # as sparsifiner_deit_tiny


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow) if n in LARGER else n for n in recipes()],
)
def test_it_patches_the_model_that_it_is_for(name: str) -> None:
    recipe = Recipe.load(name)
    if not timm.is_model(recipe.model):
        assert recipe.model == "lvvit_s"
        return
    with torch.device("meta"):
        model = timm.create_model(recipe.model)
    assert recipe.strategy is not None
    live = sparsiattn.patch(model, recipe.strategy, **recipe.options)
    assert live.active
    for stage in recipe.stages:
        assert stage.trainable == "backbone" or any(
            ".sparsiattn." in name for name, _ in model.named_parameters()
        )


def test_numbers_of_the_paper() -> None:
    first, second = Recipe.load("sparsifiner_deit_small").stages
    assert (first.epochs, first.warmup_epochs, first.lr, first.min_lr) == (5, 3, 3e-4, 2e-4)
    assert (second.epochs, second.lr, second.min_lr) == (45, 8e-5, 2e-6)
    assert second.losses == {"ce": 1.0, "kl": 0.5, "token_mse": 0.5}
    assert first.losses == {"reconstruction": 1.0}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"stages": [STAGE], "strateggy": "topk"}, "'strateggy'. Did you mean 'strategy'"),
        ({"stages": [{**STAGE, "learning_rate": 1}]}, "stage 'one': 'learning_rate'"),
        ({"stages": [{**STAGE, "lr": "fast"}]}, "lr must be a number > 0, got 'fast'"),
        ({"stages": [{**STAGE, "lr": True}]}, "lr must be a number"),
        ({"stages": [{**STAGE, "trainable": "head"}]}, "one of planners, backbone, both"),
        ({"stages": [{**STAGE, "steps": 3}]}, "epochs or steps, got both"),
        ({"stages": [{"name": "one", "ce": 1.0}]}, "needs a length: set epochs or steps"),
        ({"stages": [{"name": "one", "epochs": 1}]}, "has no loss"),
        ({"stages": [{**STAGE, "lr": 0.1, "min_lr": 1}]}, "min_lr=1 is above"),
        ({"stages": [{**STAGE, "name": "a.b"}]}, "a name without dots"),
        ({"stages": [{**STAGE, "keep_epochs": [3, 1]}]}, "start < end"),
        ({"stages": [{**STAGE, "label_smoothing": 1.0}]}, "label_smoothing"),
        ({"stages": [STAGE, STAGE]}, "must have different names"),
        ({"stages": []}, "at least one stage"),
        ({"stages": 3}, "stages must be a list"),
        ({"stages": [STAGE], "options": {"k": 0.1}}, "need a strategy"),
        ({"stages": [STAGE], "batch_size": 0}, "batch_size must be an int >= 1"),
        ({"stages": [STAGE], "mixed_precision": "int8"}, "one of no, bf16, fp16"),
        ([STAGE], "must be a mapping"),
    ],
)
def test_wrong_fields_are_named(content: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidOption) as caught:
        Recipe.from_dict(content)
    assert words in str(caught.value)


def test_a_number_that_yaml_takes_for_text_is_one(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text("stages: [{epochs: 1, ce: 1, lr: 3e-4}]\n")
    assert Recipe.load(path).stages[0].lr == 3e-4


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text("stages: [")
    with pytest.raises(InvalidOption, match=r"own\.yaml cannot be read"):
        Recipe.load(path)
    with pytest.raises(UnknownName, match="Did you mean 'evit_deit_small'"):
        Recipe.load("evit_deit_smal")


def test_changes_by_stage_by_number_and_for_all() -> None:
    recipe = Recipe.load("sparsifiner_deit_small")
    changed = recipe.changed(
        {"predictor.lr": 1, "1.epochs": 7, "clip": 2.0, "options.k": 0.1, "seed": 5, "steps": 3}
    )
    assert [stage.lr for stage in changed.stages] == [1, 8e-5]
    assert [stage.clip for stage in changed.stages] == [2.0, 2.0]
    assert [(stage.epochs, stage.steps) for stage in changed.stages] == [(None, 3)] * 2
    assert (changed.options["k"], changed.seed) == (0.1, 5)
    for name in ("predicter.lr", "predictor.lrr", "sed", "options."):
        with pytest.raises(InvalidOption, match="unknown field"):
            recipe.changed({name: 1})


def test_the_schedule_is_a_cosine_after_a_warm_up() -> None:
    import math

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    stage = Stage(epochs=2, ce=1.0, lr=1.0, min_lr=0.1, warmup_lr=0.2, warmup_epochs=0.4)
    total, warmup = lengths(stage, 5)
    assert (total, warmup) == (10, 2)
    schedule, found = make_schedule(optimizer, stage, total, warmup), []
    for update in range(total):
        schedule.step_update(update)
        found.append(optimizer.param_groups[0]["lr"])
    expected = [0.1 + 0.45 * (1 + math.cos(math.pi * t / 10)) for t in range(10)]
    assert found == pytest.approx([0.2, 0.6, *expected[2:]])


def test_lengths_that_do_not_fit() -> None:
    with pytest.raises(InvalidOption, match="must be shorter"):
        lengths(Stage(epochs=1, ce=1.0, warmup_epochs=1), 4)
    with pytest.raises(InvalidOption, match="set steps"):
        lengths(Stage(epochs=1, ce=1.0), None)
    assert lengths(Stage(steps=4, ce=1.0, warmup_steps=1), None) == (4, 1)
