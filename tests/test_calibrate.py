"""Fitting planners to dense attention."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import zoo
from torch.utils._python_dispatch import TorchDispatchMode

import sparsiattn
from sparsiattn.strategies import connectivity
from sparsiattn.strategies.connectivity import Connectivity
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


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that was made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.seen = max(self.seen, tensor.numel())
        return out


def at_site(tile: Any, block: Any) -> tuple[Any, sparsiattn.AttentionInputs]:
    """A planner of 16 x 16 patches and a CLS token, and operands for it."""
    site = sparsiattn.Site(
        name="site", index=0, depth=1, tokens=257, keys=257, heads=2, head_dim=8, value_dim=8,
        grid=(16, 16), key_grid=(16, 16), prefix_tokens=1,
    )  # fmt: skip
    planner = Connectivity(k=0.1, tile=tile, block=block).planner(site)
    q, k, v = torch.randn(3, 3, 2, 257, 8, generator=torch.Generator().manual_seed(1)).unbind(0)
    return planner, sparsiattn.AttentionInputs(q, k, v, 0.4, None, site, tile=tile, block=block)


@pytest.mark.parametrize(
    ("tile", "block"), [(1, 1), ((4, 4), 1), ((4, 4), (2, 2)), ((3, 5), (4, 3))]
)
@pytest.mark.parametrize("most", [1, 50_000, 1 << 24])
def test_the_target_is_exact_attention_averaged(
    tile: Any, block: Any, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connectivity, "MOST_ROWS", most)
    planner, inputs = at_site(tile, block)
    exact = (inputs.q @ inputs.k.mT * inputs.scale).softmax(-1)[..., 1:, :]
    rows = cells(tile)
    expected = torch.stack([exact[..., row, :].mean(-2) for row in rows], dim=-2)
    if block != 1:
        expected = torch.stack([expected[..., 1:][..., c].mean(-1) for c in cells(block)], dim=-1)
        expected = expected / expected.sum(-1, keepdim=True)
    torch.testing.assert_close(planner._target(inputs), expected)


def cells(size: Any) -> list[list[int]]:
    """Patches of every tile of a 16 x 16 grid, row by row; sides that do not divide it are cut as
    evenly as they can be."""
    if size == 1:
        return [[i] for i in range(256)]
    counts = [math.ceil(16 / side) for side in size]
    rows, columns = ([[i for i in range(16) if i * n // 16 == p] for p in range(n)] for n in counts)
    return [[16 * y + x for y in ys for x in xs] for ys in rows for xs in columns]


def test_fitting_tiles_makes_no_tensor_of_all_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connectivity, "MOST_ROWS", 1)
    planner, inputs = at_site((8, 8), (4, 4))
    for weight in planner.parameters():
        weight.requires_grad_(True)
    with Largest() as largest:
        planner.loss(inputs).backward()
    pairs = 3 * 2 * 257 * 257
    assert largest.seen <= pairs // 4  # one tile of queries against all keys
    assert planner.up.grad is not None
    assert planner.up.grad.any()
