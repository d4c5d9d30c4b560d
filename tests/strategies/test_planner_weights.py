"""Weights of planners that lost their values: they are those of a model patched with data."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.models import VisionTransformer
from torch import Tensor, nn

import sparsiattn

STRATEGIES: dict[str, dict[str, Any]] = {
    "connectivity": {"k": 0.25},
    "connectivity_channels": {"strategy": "connectivity", "k": 0.25, "channels": 4},
    "linformer": {},
    "lowrank": {"guide": 4},
    "sd_filter": {},
    "hypergraph": {},
    "attention_reuse": {},
    "skipat": {},
    "learned": {"strategy": "token_drop", "keep": 0.5, "score": "learned"},
    "sit": {"keep": 0.5},
    "patch_merger": {"keep": 8},
    "hybrid": {"k": 0.25, "keep": 0.5, "only_if_faster": False},
}


def vit() -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(
        img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=5
    )


def patched(model: nn.Module, name: str) -> nn.Module:
    sparsiattn.patch(model, **{"strategy": name, **STRATEGIES[name]})
    return model


def planner_weights(model: nn.Module) -> dict[str, Tensor]:
    return {n: t for n, t in model.state_dict().items() if ".sparsiattn." in n}


def poisoned(model: nn.Module) -> nn.Module:
    """The model with memory that was taken without values."""
    torch.use_deterministic_algorithms(True)
    filling, torch.utils.deterministic.fill_uninitialized_memory = (
        torch.utils.deterministic.fill_uninitialized_memory, True,
    )  # fmt: skip
    try:
        return model.to_empty(device="cpu")
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = filling


def on_meta(name: str) -> nn.Module:
    with torch.device("meta"):
        model = vit()
    return patched(model, name)


def inside_the_meta_context(name: str) -> nn.Module:
    with torch.device("meta"):
        return patched(vit(), name)


def reset(model: nn.Module) -> nn.Module:
    """torch's own convention."""
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return model


def each_for_itself(model: nn.Module) -> nn.Module:
    """As FSDP makes memory for modules on meta: one by one, each reset when it has its own."""
    for module in model.modules():
        if any(True for _ in module.parameters(recurse=False)):
            module.to_empty(device="cpu", recurse=False)
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
    return model


WAYS: dict[str, Callable[[str], nn.Module]] = {
    "to_empty": lambda name: poisoned(on_meta(name)),
    "patched inside the context": lambda name: poisoned(inside_the_meta_context(name)),
    "reset": lambda name: reset(poisoned(on_meta(name))),
    "one by one": lambda name: each_for_itself(on_meta(name)),
    "real weights emptied": lambda name: poisoned(patched(vit(), name)),
    "a copy": lambda name: poisoned(copy.deepcopy(on_meta(name))),
    "pickled": lambda name: poisoned(pickle.loads(pickle.dumps(on_meta(name)))),
}


@pytest.mark.parametrize(
    ("name", "way"),
    [(name, "to_empty") for name in STRATEGIES]
    + [(name, way) for name in ("connectivity_channels", "learned") for way in WAYS],
)
def test_a_dense_checkpoint_gives_what_a_patch_with_data_gives(name: str, way: str) -> None:
    dense, x = vit(), torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    checkpoint = {n: t.clone() for n, t in dense.state_dict().items()}
    patched(dense, name).eval()
    model = WAYS[way](name)
    model.load_state_dict(checkpoint, strict=True)
    expected, found = planner_weights(dense), planner_weights(model)
    assert list(found) == list(expected)
    for key, value in expected.items():
        assert torch.equal(found[key], value), key
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), dense(x))


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_checkpoint_that_is_assigned_brings_planners_along(name: str) -> None:
    dense = patched(vit(), name).eval()
    model, x = on_meta(name).eval(), torch.randn(2, 3, 32, 32)
    model.load_state_dict(vit().state_dict(), strict=True, assign=True)
    assert not any(p.is_meta for p in model.parameters())
    trainable = {n for n, p in dense.named_parameters() if p.requires_grad}
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trainable
    with torch.no_grad():
        torch.testing.assert_close(model(x), dense(x))


def test_trained_planners_are_loaded_as_ever() -> None:
    trained = patched(vit(), "learned")
    for value in planner_weights(trained).values():
        value.add_(1.0)
    model = poisoned(on_meta("learned"))
    model.load_state_dict(trained.state_dict(), strict=True)
    for name, value in planner_weights(trained).items():
        assert torch.equal(model.state_dict()[name], value)


def test_other_precision_and_moves_keep_values() -> None:
    model = patched(vit(), "learned")
    for value in planner_weights(model).values():
        value.add_(1.0)
    before = {n: t.clone() for n, t in planner_weights(model).items()}
    model.to(torch.float64).to("cpu").requires_grad_(False)
    for name, value in planner_weights(model).items():
        torch.testing.assert_close(value, before[name].double())


class Gain(sparsiattn.LearnedPlanner):
    """Of somebody else, with a part that torch would fill with random values."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.full((heads,), 2.0), requires_grad=False)
        self.norm = nn.LayerNorm(heads)


def test_a_reset_draws_from_no_global_generator() -> None:
    planners = [m for m in patched(vit(), "learned").modules() if hasattr(m, "log_probabilities")]
    before = torch.get_rng_state()
    for planner in planners:
        planner.reset_parameters()
    assert planners
    assert torch.equal(torch.get_rng_state(), before)


def test_planners_of_others_are_reset_too() -> None:
    planner = Gain(heads=3)
    planner.gain.zero_()
    planner.reset_parameters()
    assert planner.gain.tolist() == [2.0] * 3
    emptied = poisoned(copy.deepcopy(planner).to("meta"))
    assert emptied.gain.tolist() == [2.0] * 3
    assert emptied.norm.weight.tolist() == [1.0] * 3
