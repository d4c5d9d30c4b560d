"""Density peaks of k nearest neighbours: tokens merge into the middle of dense groups of them.

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
    """Merges every token into the nearest of those in the middle of dense groups.

    A token is such a centre if it has near neighbours and is far from any that has nearer ones.

    Args:
        keep: See `Clustering`; `published_counts` gives those of the TokenReduction study.
        k: Nearest neighbours, the token itself among them, whose distance makes the density.
        proportional: Whether a merged token weighs as a key by the patches in it; it does not in
            the published models.

    >>> DPCKNN(keep=0.5, layers=[4]).target_count(196)
    98
    """

    name = "dpc_knn"
    paper = "https://arxiv.org/abs/2204.08680"
    fidelity = (
        "as published code (the TokenReduction study's) with equal weights in place of a trained "
        "score; sizes weigh the means, and ties of density go by order instead of by noise"
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

    Density is ``exp(-mean of squares)`` of a token's ``k`` smallest distances, separation its
    distance to the nearest token that is denser (of equally dense ones the first is), at most the
    largest in the image.

    Args:
        distances: ``[B, n, n]``, infinite where two tokens are no neighbours.
        count: Tokens to return.
        k: Neighbours that make the density.

    Returns:
        ``[B, count]``, ascending.
    """
    neighbours = distances.topk(min(k, distances.shape[1]), dim=2, largest=False).values
    sparsity = neighbours.square().mean(2)
    rank = ranks(sparsity.argsort(dim=1, stable=True))
    denser = rank[:, None] < rank[:, :, None]
    farthest = distances.masked_fill(distances.isinf(), 0.0).amax((1, 2))
    separation = distances.masked_fill(~denser, float("inf")).amin(2).minimum(farthest[:, None])
    # the logarithm of the product: far tokens have a density that would round to zero
    score = separation.log() - sparsity
    best = score.argsort(dim=1, descending=True, stable=True)[:, :count]
    return best.sort(dim=1).values
