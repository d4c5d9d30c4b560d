"""Weighted K-medoids: the tokens stay from which all others are nearest.

Token Pooling, WACV 2023, arXiv 2110.03860; as compared in the TokenReduction study, arXiv
2308.04657.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sparsiattn import Reduction, TokenInputs
from sparsiattn.methods._options import check_count
from sparsiattn.methods._tokens import precise
from sparsiattn.methods.clusters import Clustering, pairwise_distances, ranks, to_nearest


@dataclass(frozen=True)
class KMedoids(Clustering):
    """Keeps the tokens from which all others are nearest, those that get attention counting more.

    Weights are the attention that every token receives, over all queries and heads. The heaviest
    tokens are the first medoids. In every iteration each token joins the nearest medoid, and the
    medoid of a cluster becomes the member whose distances to the others, weighted, sum to the
    least.

    Args:
        keep: See `Clustering`; `published_counts` gives those of the study.
        iterations: How often medoids are chosen again.
        layers: Blocks at whose exit tokens are reduced; those before a quarter, half and three
            quarters of the depth where None.

    >>> KMedoids(keep=0.5).layers_in(12)
    (2, 5, 8)
    """

    name = "kmedoids"
    paper = "https://arxiv.org/abs/2110.03860"
    fidelity = (
        "as published; of the TokenReduction study's code it has the places, the start and the "
        "iterations, but new medoids come from the weights of a cluster's members, where that code "
        "sums over all tokens and weighs by the candidate itself"
    )
    place = "exit"
    needs_attention = True

    iterations: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("iterations", self.iterations)

    def default_layers(self, depth: int) -> tuple[int, ...]:
        return tuple(sorted({max(0, layer - 1) for layer in super().default_layers(depth)}))

    def cluster(self, tokens: TokenInputs, count: int) -> Reduction:
        distances = pairwise_distances(precise(tokens.x)).sqrt()
        weight = precise(tokens.received_attention()).to(distances.dtype)
        medoids = weighted_medoids(distances, weight, count, self.iterations)
        return Reduction.cluster(medoids, to_nearest(distances, medoids))


def weighted_medoids(distances: Tensor, weight: Tensor, count: int, iterations: int) -> Tensor:
    """The medoids of tokens; of equally good ones the first in order.

    Args:
        distances: ``[B, n, n]``.
        weight: ``[B, n]``, of tokens.
        count: Medoids.
        iterations: How often they are chosen again.

    Returns:
        ``[B, count]``, ascending.
    """
    medoids = weight.argsort(dim=1, descending=True, stable=True)[:, :count]
    for _ in range(iterations):
        assign = to_nearest(distances, medoids)
        together = assign[:, :, None] == assign[:, None]
        cost = (distances * weight[:, None]).masked_fill(~together, 0.0).sum(2)
        medoids = _cheapest(cost, assign, count)
    return medoids.sort(dim=1).values


def _cheapest(cost: Tensor, assign: Tensor, count: int) -> Tensor:
    """``[B, count]``: the token of least cost ``[B, n]`` in every cluster."""
    order = cost.argsort(dim=1, stable=True)
    rank = ranks(order)
    best = rank.new_full((rank.shape[0], count), rank.shape[1])
    return order.gather(1, best.scatter_reduce(1, assign, rank, "amin"))
