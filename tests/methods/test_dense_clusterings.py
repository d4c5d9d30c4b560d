"""AiluRus and Expedit, which give dense tasks all positions back, against plain loops."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import sparsiattn
from sparsiattn.methods.ailurus import AiluRus
from sparsiattn.methods.clusters import Clustering
from sparsiattn.methods.expedit import Expedit
from sparsiattn.testing import tiny_images, tiny_vit
from tests.support.clustering import (
    distances_by_hand,
    entering,
    nearest_by_hand,
    partition,
    peaks_by_hand,
    token_inputs,
)


def local_by_hand(x: Tensor, grid: tuple[int, int], near: int, alpha: float) -> Any:
    rows, columns = grid
    d, n = distances_by_hand(x), range(rows * columns)
    far = [
        [(i // columns - j // columns) ** 2 + (i % columns - j % columns) ** 2 for j in n]
        for i in n
    ]
    local = [[math.inf] * len(n) for _ in n]
    for i in n:
        for rank, j in enumerate(sorted(n, key=lambda j: (far[i][j], j))[:near]):
            factor = alpha + (1 - alpha) * rank / near
            local[i][j] = d[i][j] / math.sqrt(x.shape[1]) * factor
    return local, far


@pytest.mark.parametrize(("near", "keep"), [(0.25, 8), (4, 3)])
def test_ailurus_is_the_formula(near: int | float, keep: int) -> None:
    grid, x = (4, 6), torch.randn(2, 24, 8)
    strategy = AiluRus(keep=keep, neighbours=near, alpha=0.3, k=3, detail=True)
    reduction = strategy.reduce(token_inputs(x, grid))
    later = torch.randn(2, keep, 8)
    for i in range(2):
        local, far = local_by_hand(x[i], grid, 6 if near == 0.25 else near, 0.3)
        centres = peaks_by_hand(local, keep, 3)
        assert reduction.index[i].tolist() == centres
        reachable = [min(local[j][c] for c in centres) < math.inf for j in range(24)]
        assert near == 0.25 or not all(reachable)
        assign = [nearest_by_hand(local if reachable[j] else far, centres)[j] for j in range(24)]
        assert reduction.assign[i].tolist() == assign
        means = [x[i][[j for j in range(24) if assign[j] == c]].mean(0) for c in range(keep)]
        torch.testing.assert_close(reduction.values[i], torch.stack(means))
        unfolded = [later[i, c] + x[i, j] - means[c] for j, c in enumerate(assign)]
        torch.testing.assert_close(reduction.unfold(later)[i], torch.stack(unfolded))


def test_ailurus_knows_where_merged_tokens_are() -> None:
    """After an earlier reduction, neighbours are those in the image, not in the sequence."""
    x, ids = torch.randn(1, 4, 8), torch.tensor([[0, 15, 1, 14]])
    strategy = AiluRus(keep=2, neighbours=2, alpha=1.0, k=1, layers=[0])
    reduction = strategy.reduce(token_inputs(x, (4, 4), ids=ids))
    assert partition(reduction.assign[0].tolist()) == {frozenset({0, 2}), frozenset({1, 3})}


def superpixels_by_hand(x: Tensor, grid: Any, cells: Any, strategy: Expedit) -> Tensor:
    """Centroids ``[m, C]``: Expedit's clustering, one token at a time."""
    image = x.T.reshape(-1, *grid)
    centroids = []
    for r in range(cells[0]):
        for c in range(cells[1]):
            top, left = r * grid[0] // cells[0], c * grid[1] // cells[1]
            bottom, right = -(-(r + 1) * grid[0] // cells[0]), -(-(c + 1) * grid[1] // cells[1])
            centroids.append(image[:, top:bottom, left:right].mean((1, 2)))
    for _ in range(strategy.iterations):
        shares: list[list[tuple[int, float]]] = []
        for j in range(len(x)):
            home = (j // grid[1] * cells[0] // grid[0], j % grid[1] * cells[1] // grid[1])
            near = [
                (m, math.exp(-strategy.temperature * float((x[j] - centroids[m]).square().sum())))
                for m in range(len(centroids))
                if abs(m // cells[1] - home[0]) <= strategy.radius
                and abs(m % cells[1] - home[1]) <= strategy.radius
            ]
            total = sum(w for _, w in near)
            shares.append([(m, w / total) for m, w in near])
        sums = [torch.zeros(x.shape[1]) for _ in centroids]
        weights = [0.0] * len(centroids)
        for j, row in enumerate(shares):
            for m, w in row:
                sums[m], weights[m] = sums[m] + w * x[j], weights[m] + w
        centroids = [s / w for s, w in zip(sums, weights, strict=True)]
    return torch.stack(centroids)


def reconstructed_by_hand(x: Tensor, before: Tensor, later: Tensor, strategy: Expedit) -> Tensor:
    rows = []
    for token in x:
        d = [float((token - c).square().sum()) for c in before]
        nearest = sorted(range(len(d)), key=lambda m: d[m])[: strategy.neighbours]
        w = [math.exp(-strategy.temperature * d[m]) for m in nearest]
        rows.append(sum(v / sum(w) * later[m] for v, m in zip(w, nearest, strict=True)))
    return torch.stack(rows)


@pytest.mark.parametrize(("grid", "cells"), [((6, 8), (4, 5)), ((5, 7), (5, 3))])
def test_expedit_is_the_formula(grid: tuple[int, int], cells: tuple[int, int]) -> None:
    strategy = Expedit(cells=cells, temperature=0.1, radius=1, neighbours=4, iterations=3)
    x = torch.randn(2, grid[0] * grid[1], 6)
    reduction = strategy.reduce(token_inputs(x, grid))
    later = torch.randn(2, cells[0] * cells[1], 6)
    for i in range(2):
        centroids = superpixels_by_hand(x[i], grid, cells, strategy)
        torch.testing.assert_close(reduction.values[i], centroids, rtol=1e-4, atol=1e-5)
        expected = reconstructed_by_hand(x[i], centroids, later[i], strategy)
        torch.testing.assert_close(reduction.unfold(later)[i], expected, rtol=1e-4, atol=1e-5)
        labels = [
            min(range(len(centroids)), key=lambda m: float((t - centroids[m]).norm())) for t in x[i]
        ]
        assert reduction.assign[i].tolist() == labels
    middle = reduction.index[0].tolist()
    assert middle[0] == (grid[0] // cells[0] // 2) * grid[1] + grid[1] // cells[1] // 2
    assert len(set(middle)) == len(middle)


@pytest.mark.parametrize("strategy", [Expedit(layers=[0], temperature=0.02), AiluRus(detail=True)])
def test_dense_consumers_get_what_the_strategy_unfolds(strategy: Clustering) -> None:
    """The last block's short output, unfolded by hand, is what features are."""
    model: Any = tiny_vit()
    x = tiny_images(2)
    layer = strategy.layers_in(2)[0]
    short: list[Tensor] = []
    with torch.no_grad():
        dense = entering(model, layer, x)[:, 1:]
        live = sparsiattn.patch(model, strategy)
        hook = model.blocks[-1].register_forward_hook(lambda _, __, out: short.append(out))
        model(x)
        hook.remove()
        maps = model.forward_intermediates(x, intermediates_only=True, norm=False)
        live.unpatch()
    assert maps[-1].shape == (2, 48, 8, 8)
    reduction = strategy.reduce(token_inputs(dense, (8, 8)))
    unfolded = reduction.unfold(short[0][:, 1:])
    torch.testing.assert_close(maps[-1].flatten(2).mT, unfolded, rtol=1e-4, atol=1e-4)
    assert short[0].shape[1] < 65


def test_scatter_leaves_merged_positions_at_their_last_value() -> None:
    model: Any = tiny_vit()
    x = tiny_images(1)
    strategy = AiluRus(keep=36, layers=[1], restore="scatter")
    with torch.no_grad():
        dense = entering(model, 1, x)[0, 1:]
        with sparsiattn.patch(model, strategy):
            features = model.blocks(model._pos_embed(model.patch_embed(x)))[0, 1:]
    same = (features - dense).abs().amax(1) < 1e-6
    assert int(same.sum()) == 64 - 36


def test_expedit_without_fine_grid() -> None:
    assert Expedit(keep=0.49).grid_of(40, 40) == (28, 28)
    assert Expedit(keep=30).grid_of(8, 8) == (5, 5)
    assert Expedit(keep=0.01).grid_of(3, 3) == (1, 1)
    assert Expedit(cells=[9, 4]).grid_of(8, 8) == (8, 4)
    fewer = token_inputs(torch.randn(1, 12, 4), (4, 4), ids=torch.arange(12)[None])
    with pytest.raises(sparsiattn.InvalidOption, match="merged before"):
        Expedit().reduce(fewer)
