"""Density peaks of k nearest neighbours: tokens are merged into centres of dense groups.

TCFormer, CVPR 2022, arXiv 2204.08680, section 3.2.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sparsiattn import Reduction, TokenInputs
from sparsiattn.methods._options import check_count
from sparsiattn.methods._tokens import precise
from sparsiattn.methods.clusters import Clustering, pairwise_distances, ranks, to_nearest


@dataclass(frozen=True)
class DPCKNN(Clustering):
    """Merges every token into the nearest centre of a dense group.

    A token is a centre if its neighbours are near, and tokens of higher density are far.

    Args:
        keep: See `Clustering`; `published_counts` returns the counts of the TokenReduction study.
        k: Number of nearest neighbours, including the token itself, that determine the density.
        proportional: Whether attention weights a merged token by its number of patches; the
            published models do not.

    >>> DPCKNN(keep=0.5, layers=[4]).target_count(196)
    98
    """

    name = "dpc_knn"
    paper = "https://arxiv.org/abs/2204.08680"
    fidelity = (
        "as published code (of the TokenReduction study) with equal weights instead of a trained "
        "score; means are weighted by size, and ties of density are broken by order instead of "
        "noise"
    )
    place = "entry"

    k: int = 5
    proportional: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("k", self.k)

    def cluster(self, tokens: TokenInputs, count: int) -> Reduction:
        distances = (pairwise_distances(precise(tokens.x)) / tokens.x.shape[-1]).sqrt()
        centres = density_peaks(distances, count, self.k)
        return Reduction.merge(tokens.x, to_nearest(distances, centres), centres, tokens.size)


def density_peaks(distances: Tensor, count: int, k: int) -> Tensor:
    """The tokens with the largest product of density and separation.

    Density is ``exp(-mean of squares)`` of a token's ``k`` smallest distances. Separation is the
    distance to the nearest denser token (the first one of equally dense tokens), limited to the
    largest distance in the image.

    Args:
        distances: ``[B, n, n]``, infinite for tokens that are not neighbours.
        count: Number of tokens to return.
        k: Number of neighbours that determine the density.

    Returns:
        ``[B, count]``, indices in ascending order.
    """
    neighbours = distances.topk(min(k, distances.shape[1]), dim=2, largest=False).values
    sparsity = neighbours.square().mean(2)
    rank = ranks(sparsity.argsort(dim=1, stable=True))
    denser = rank[:, None] < rank[:, :, None]
    farthest = distances.masked_fill(distances.isinf(), 0.0).amax((1, 2))
    separation = distances.masked_fill(~denser, float("inf")).amin(2).minimum(farthest[:, None])
    # the logarithm of the product, as the density of isolated tokens would round to zero
    score = separation.log() - sparsity
    best = score.argsort(dim=1, descending=True, stable=True)[:, :count]
    return best.sort(dim=1).values
