"""Token strategies on Hugging Face and torchvision models, and what their callers get."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import sparsiattn
from tests.support import hosts, zoo

PLAIN = [name for name in hosts.HOSTS if name not in ("clip_tower", "encoder")]
SPECS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "drop": ({"strategy": "token_drop", "keep": 0.5, "layers": [0]}, {"keep": 1.0}),
    "fuse": ({"strategy": "token_drop", "keep": 0.5, "layers": [0], "fuse": True}, {"keep": 1.0}),
    "merge": ({"strategy": "token_merge", "r": 20}, {"r": 0}),
    "learned": (
        {"strategy": "token_drop", "keep": 0.5, "layers": [1], "score": "learned"}, {"keep": 1.0},
    ),
    "hybrid": (
        {"strategy": "hybrid", "k": 0.25, "keep": 0.5, "layers": [0], "only_if_faster": False},
        {"k": 1.0, "keep": 1.0},
    ),
}  # fmt: skip


def outcome(model: nn.Module, x: Tensor) -> Tensor:
    """The one tensor that matters of a host's output."""
    found = model(x)
    if isinstance(found, Tensor):
        return found
    return found["logits"] if "logits" in found else found[0]


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def crossed(names: list[str], specs: list[str]) -> list[Any]:
    """Every host with every spec; all but dropping and merging is slow, except on one host."""
    return [
        pytest.param(h, s, marks=[] if h == "vit" or s in ("drop", "merge") else pytest.mark.slow)
        for h in names
        for s in specs
    ]


@pytest.mark.parametrize(("host", "spec"), crossed(PLAIN, list(SPECS)))
def test_identity_change_undo_and_copies(host: str, spec: str) -> None:
    options, full = SPECS[spec]
    model, x = hosts.build(host), hosts.images()
    with torch.no_grad():
        dense = outcome(model, x)
        with sparsiattn.patch(model, **{**options, **full}):
            assert relative(outcome(model, x), dense) <= 1e-5
        kind = type(model)
        live = sparsiattn.patch(model, **options)
        sparse = outcome(model, x)
        assert sparse.shape == dense.shape
        assert relative(sparse, dense) > 1e-6
        assert relative(outcome(model, x[:1]), sparse[:1]) < 1e-4
        with live.disabled():
            assert torch.equal(outcome(model, x), dense)
        assert torch.equal(outcome(copy.deepcopy(model), x), sparse)
        assert "patch tokens" in str(live.report())
        live.unpatch()
        assert torch.equal(outcome(model, x), dense)
        assert type(model) is kind


HF = [name for name in PLAIN if name != "torchvision"]


@pytest.mark.parametrize(("host", "spec"), crossed(HF, ["drop", "fuse", "merge"]))
def test_checkpointing_of_a_blocks_forward_alone(host: str, spec: str) -> None:
    """transformers checkpoints ``forward``, so the block's own hooks do not run again."""
    model, x = hosts.build(host).train(), hosts.images()
    with sparsiattn.patch(model, **SPECS[spec][0]):
        direct = gradients(model, x)
        checkpointed(model, use_reentrant=False)
        for mine, theirs in zip(gradients(model, x), direct, strict=True):
            torch.testing.assert_close(mine, theirs)


def checkpointed(model: Any, use_reentrant: bool) -> None:
    for name in ("activation_checkpointing_enable", "gradient_checkpointing_enable"):
        if hasattr(model, name):
            getattr(model, name)({"use_reentrant": use_reentrant})
            return


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    torch.manual_seed(3)  # DINOv3 augments its positions
    wanted = [p for p in model.parameters() if p.requires_grad]
    grads = torch.autograd.grad(outcome(model, x).square().sum(), wanted, allow_unused=True)
    return [g for g in grads if g is not None]


def test_reentrant_checkpoints_around_a_forward_lose_no_gradient() -> None:
    """Refused, except where (as in transformers 5.4) the block's hooks run inside of them."""
    model, x = hosts.build("vit").train(), hosts.images().requires_grad_()
    with sparsiattn.patch(model, "token_drop", keep=0.5, layers=[0]):
        direct = trained(model, x)
        checkpointed(model, use_reentrant=True)
        found, refusal = None, ""
        try:
            found = trained(model, x)
        except sparsiattn.ModelChanged as error:
            refusal = str(error)
    if found is None:
        assert "use_reentrant=False" in refusal
    else:
        torch.testing.assert_close(found, direct)


def trained(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Gradients by backward(), as reentrant checkpoints need it."""
    model.zero_grad()
    outcome(model, x).square().sum().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize(
    ("host", "spec"), crossed(["vit", "dinov2", "clip", "siglip", "dinov3"], list(SPECS))
)
def test_hidden_states_have_every_position(host: str, spec: str) -> None:
    model, x = hosts.build(host), hosts.images()
    with torch.no_grad():
        dense = model(x, output_hidden_states=True).hidden_states
        with sparsiattn.patch(model, **SPECS[spec][0]):
            logits = outcome(model, x)
            found = model(x, output_hidden_states=True)
            assert [h.shape for h in found.hidden_states] == [h.shape for h in dense]
            again = found["logits"] if "logits" in found else found[0]
            # a head that averages patches sees the dropped ones' last values as well
            if host != "dinov2" or spec == "merge":
                torch.testing.assert_close(again, logits, rtol=1e-4, atol=1e-5)


def test_features_only_models_keep_their_maps() -> None:
    model = timm.create_model("test_vit", features_only=True).eval()
    x = torch.randn(2, 3, 160, 160)
    with torch.no_grad():
        shapes = [m.shape for m in model(x)]
        for options in ({"strategy": "token_drop"}, {"strategy": "token_merge", "r": 9}):
            with sparsiattn.patch(model, **options) as live:
                assert [m.shape for m in model(x)] == shapes
                assert live.report().macs < live.report().macs_dense
            with pytest.raises(sparsiattn.InvalidOption, match="restore='auto'"):
                sparsiattn.patch(model, **options, restore=None)


def test_learned_scores_train() -> None:
    """The ratio loss moves the share of kept tokens to the one asked for."""
    model = zoo.build("vit").train()
    live = sparsiattn.patch(model, "token_drop", score="learned", keep=0.3, layers=[1])
    planner: Any = live.blocks[0].planner
    weights = list(planner.parameters())
    optimizer = torch.optim.Adam(weights, 3e-3)
    x = torch.randn(8, 3, 32, 32)
    losses = []
    for _ in range(60):
        model(x)
        loss = sparsiattn.training.keep_ratio_loss(model)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in weights)
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])


def test_the_task_reaches_learned_scores_through_attention() -> None:
    model = zoo.build("vit").train()
    live = sparsiattn.patch(model, "token_drop", score="learned", keep=0.5, layers=[0])
    planner: Any = live.blocks[0].planner
    model(torch.randn(4, 3, 32, 32)).square().sum().backward()
    assert planner.decide[0].weight.grad.abs().max() > 0


@pytest.mark.parametrize("host", ["clip_tower", "swin"])
def test_refusals_name_the_model_and_an_alternative(host: str) -> None:
    model = hosts.build(host) if host in hosts.HOSTS else zoo.build(host)
    with pytest.raises(sparsiattn.InvalidOption, match="connectivity"):
        sparsiattn.patch(model, "token_merge")
    assert sparsiattn.patch_of(model) is None
