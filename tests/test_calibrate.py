"""Fitting planners to dense attention."""

from __future__ import annotations

import pytest
import torch
import zoo

import sparsiattn
from sparsiattn.testing.hosts import tiny_images, tiny_vit


def batches(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(4, 3, 32, 32, generator=generator) for _ in range(count)]


@pytest.mark.parametrize("tile", [1, (2, 2)])
def test_it_lowers_the_loss_and_leaves_the_host_alone(tile: object) -> None:
    model = tiny_vit()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    seen: list[int] = []
    with sparsiattn.patch(model, k=0.2, tile=tile) as live:
        for runtime in live.runtimes:  # a start as bad as can be, so that there is much to learn
            runtime.planner.up.data.uniform_(0, 1)  # type: ignore[attr-defined]
        losses = sparsiattn.calibrate(
            model, batches(40), steps=30, lr=1e-2, on_step=lambda step, loss: seen.append(step)
        )
        assert live.learns
        assert not any(p.requires_grad for p in live.runtimes[0].planner.parameters())  # type: ignore[attr-defined]
        assert all(torch.equal(model.state_dict()[n], t) for n, t in before.items())
        assert all(p.grad is None for p in model.parameters())
    assert len(losses) == 30
    assert seen == list(range(30))
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_channel_maps_learn_too() -> None:
    with sparsiattn.patch(tiny_vit(), k=0.2, channels=4) as live:
        planner = live.runtimes[0].planner
        first = planner.project_q.weight.clone()  # type: ignore[attr-defined]
        sparsiattn.calibrate(live.model, batches(2))
        assert not torch.equal(first, planner.project_q.weight)  # type: ignore[attr-defined]


def test_training_mode_is_given_back() -> None:
    with sparsiattn.patch(tiny_vit(), k=0.2) as live:
        live.model.train()
        sparsiattn.calibrate(live.model, batches(1))
        assert live.model.training


@pytest.mark.parametrize("strategy", [None, "topk"])
def test_nothing_to_fit_is_an_error(strategy: str | None) -> None:
    model = zoo.build("vit")
    if strategy:
        sparsiattn.patch(model, strategy)
    with pytest.raises(sparsiattn.InvalidOption, match="fits learned planners"):
        sparsiattn.calibrate(model, [tiny_images()])
