"""DPC-KNN and k-medoids against plain loops written from the formulas."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import sparsiattn
from sparsiattn.methods.clusters import squared_distances, to_nearest
from sparsiattn.methods.dpc_knn import DPCKNN, density_peaks
from sparsiattn.methods.kmedoids import KMedoids, weighted_medoids
from sparsiattn.testing import tiny_images, tiny_vit
from tests.support.clustering import (
    distances_by_hand,
    entering,
    nearest_by_hand,
    peaks_by_hand,
    token_inputs,
)
from tests.support.plain_vit import PlainViT


def test_dpc_knn_is_the_formula() -> None:
    x = torch.randn(3, 20, 8)
    reduction = DPCKNN(keep=6, k=4).reduce(token_inputs(x, (4, 5)))
    for i, tokens in enumerate(x):
        d = [[v / math.sqrt(8) for v in row] for row in distances_by_hand(tokens)]
        centres = peaks_by_hand(d, 6, 4)
        assert reduction.index[i].tolist() == centres
        assign = nearest_by_hand(d, centres)
        assert reduction.assign[i].tolist() == assign
        for c in range(6):
            members = [j for j in range(20) if assign[j] == c]
            torch.testing.assert_close(reduction.values[i, c], tokens[members].mean(0))
            assert reduction.size[i, c] == len(members)


def test_density_peaks_of_equal_tokens_come_by_order() -> None:
    assert density_peaks(torch.zeros(1, 6, 6), 3, 5).tolist() == [[0, 1, 2]]
    # densities that round to zero are still told apart
    points = torch.tensor([[0.0, 40.0, 80.5, 500.0]])
    far = (points[:, :, None] - points[:, None]).abs()
    assert density_peaks(far, 2, 2).tolist() == [[0, 1]]


def medoids_by_hand(d: list[list[float]], weight: list[float], count: int, times: int) -> list[int]:
    n = range(len(d))
    medoids = sorted(n, key=lambda i: (-weight[i], i))[:count]
    for _ in range(times):
        assign = nearest_by_hand(d, medoids)
        for c in range(count):
            members = [j for j in n if assign[j] == c]
            medoids[c] = min(members, key=lambda i: sum(weight[j] * d[i][j] for j in members))
    return sorted(medoids)


@pytest.mark.parametrize("times", [1, 3])
def test_kmedoids_are_the_formula(times: int) -> None:
    x, weight = torch.randn(3, 20, 6), torch.rand(3, 20)
    distances = squared_distances(x, x).sqrt()
    found = weighted_medoids(distances, weight, 7, times)
    for i in range(3):
        d = distances_by_hand(x[i])
        assert found[i].tolist() == medoids_by_hand(d, weight[i].tolist(), 7, times)
    # two medoids on one spot: each keeps its own cluster
    twins = torch.tensor([[[0.0], [0.0], [3.0]]])
    same = squared_distances(twins, twins).sqrt()
    assert weighted_medoids(same, torch.tensor([[3.0, 2.0, 1.0]]), 2, 3).tolist() == [[0, 1]]
    assert to_nearest(same, torch.tensor([[0, 1]])).tolist() == [[0, 1, 0]]


def test_kmedoids_come_at_the_exit_by_the_attention_of_the_block() -> None:
    model: Any = tiny_vit()
    x = tiny_images(2)
    with torch.no_grad():
        whole = entering(model, 1, x)
        with sparsiattn.patch(model, KMedoids(keep=20, layers=[0])) as live:
            short, source = entering(model, 1, x), live.source()
        plain = PlainViT(model)
        for i in range(2):
            first = model._pos_embed(model.patch_embed(x[i : i + 1]))[0]
            _, weights, _ = plain.attend(
                model.blocks[0].attn, model.blocks[0].norm1(first), [1.0] * 65
            )
            received = weights.mean(0).sum(0)[1:].tolist()
            d = distances_by_hand(whole[i, 1:])
            medoids = medoids_by_hand(d, received, 20, 3)
            torch.testing.assert_close(short[i, 1:], whole[i, 1:][medoids])
            torch.testing.assert_close(short[i, 0], whole[i, 0])
            assert (source[i, 1:] - 1).tolist() == nearest_by_hand(d, medoids)
