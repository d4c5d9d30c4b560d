"""Weighted K-medoids: keep the tokens with the smallest distances to all others.

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
    """Keeps the medoids of all tokens, weighted by the attention that tokens receive.

    Weights are the attention that every token receives from all queries and heads. The tokens with
    the largest weights are the initial medoids. In every iteration each token joins the nearest
    medoid, and the new medoid of a cluster is the member with the smallest weighted sum of
    distances to the others.

    Args:
        keep: See `Clustering`; `published_counts` returns the counts of the study.
        iterations: Number of updates of the medoids.
        layers: Blocks at whose exit tokens are reduced; None for the blocks before a quarter, half
            and three quarters of the depth.

    >>> KMedoids(keep=0.5).layers_in(12)
    (2, 5, 8)
    """

    name = "kmedoids"
    paper = "https://arxiv.org/abs/2110.03860"
    fidelity = (
        "as published; layers, initial medoids and iterations follow the TokenReduction study's "
        "code, but new medoids use the weights of a cluster's members, while that code sums over "
        "all tokens with the weight of the candidate"
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
    """The medoids of tokens; ties are broken by order.

    Args:
        distances: ``[B, n, n]``.
        weight: ``[B, n]``, weights of tokens.
        count: Number of medoids.
        iterations: Number of updates.

    Returns:
        ``[B, count]``, indices in ascending order.
    """
    medoids = weight.argsort(dim=1, descending=True, stable=True)[:, :count]
    for _ in range(iterations):
        assign = to_nearest(distances, medoids)
        together = assign[:, :, None] == assign[:, None]
        cost = (distances * weight[:, None]).masked_fill(~together, 0.0).sum(2)
        medoids = _cheapest(cost, assign, count)
    return medoids.sort(dim=1).values


def _cheapest(cost: Tensor, assign: Tensor, count: int) -> Tensor:
    """The token with the smallest cost ``[B, n]`` in every cluster: ``[B, count]``."""
    order = cost.argsort(dim=1, stable=True)
    rank = ranks(order)
    best = rank.new_full((rank.shape[0], count), rank.shape[1])
    return order.gather(1, best.scatter_reduce(1, assign, rank, "amin"))
