"""AiluRus: fewer tokens where an image is uniform, for dense prediction.

NeurIPS 2023, arXiv 2311.01197.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor

from sparsiattn import Reduction, TokenInputs, check_budget, count_of
from sparsiattn.methods._options import check_count, check_number
from sparsiattn.methods._tokens import gather_tokens, precise
from sparsiattn.methods.clusters import Clustering, pairwise_distances, to_nearest
from sparsiattn.methods.dpc_knn import density_peaks


@dataclass(frozen=True)
class AiluRus(Clustering):
    """Merges tokens into nearby representatives, runs the later blocks on these, and gives every
    position the output of its representative.

    Representatives are density peaks (see `density_peaks`) of feature distances that grow with the
    distance in the image. The distance to the ``rank``-th nearest token in the image is multiplied
    by ``alpha + (1 - alpha) rank / neighbours``, and is infinite beyond ``neighbours`` tokens.

    Args:
        keep: See `Clustering`.
        k: Number of nearest neighbours that determine the density.
        alpha: Factor of the distance to the nearest token in the image, from 0 to 1.
        neighbours: Share or count of the tokens that a token may be merged with.
        proportional: Whether attention weights a merged token by its number of patches.
        detail: Whether every position also gets the difference from its cluster at the time of
            merging (not in the paper).
        layers: Blocks at whose entry tokens are merged; None for one block at a twelfth of the
            depth.

    >>> AiluRus(keep=0.4).layers_in(24)
    (2,)
    """

    name = "ailurus"
    suite = MappingProxyType({"ordered": True})  # it depends on positions in the image
    paper = "https://arxiv.org/abs/2311.01197"
    fidelity = (
        "inspired by: no code was published; the spatial factor of distances and its constants "
        "(alpha, neighbours, k) are a reconstruction, and detail is an addition"
    )
    needs_grid = True
    place = "entry"

    k: int = 5
    alpha: float = 0.5
    neighbours: int | float = 0.25
    proportional: bool = True
    detail: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("k", self.k)
        check_number("alpha", self.alpha, 0, 1)
        check_budget(self.neighbours, "neighbours")

    def default_layers(self, depth: int) -> tuple[int, ...]:
        return (min(max(1, depth // 12), depth - 1),)

    def cluster(self, tokens: TokenInputs, count: int) -> Reduction:
        near = count_of(self.neighbours, tokens.count)
        order = spatial_order(tokens.positions(), tokens.grid[1])
        distances = (pairwise_distances(precise(tokens.x)) / tokens.x.shape[-1]).sqrt()
        local = spatial_distances(distances, order, near, self.alpha)
        centres = density_peaks(local, count, min(self.k, near))
        assign = to_reachable(local, order, centres)
        merged = Reduction.merge(tokens.x, assign, centres, tokens.size)
        if not self.detail:
            return merged
        assert merged.values is not None
        residual = tokens.x - gather_tokens(merged.values, assign)
        return replace(merged, unfold=partial(with_detail, assign, residual))


def spatial_order(positions: Tensor, columns: int) -> Tensor:
    """Integers that sort tokens by their distance in the image, and by index for equal distances.

    Args:
        positions: ``[B|1, n]``, indices of patches in raster order.
        columns: Number of columns of the grid.

    Returns:
        ``[B|1, n, n]``; row ``i`` sorts the tokens by their distance from token ``i``.
    """
    n = positions.shape[1]
    squared = sum(
        (side[:, :, None] - side[:, None]).square()
        for side in (positions // columns, positions % columns)
    )
    return squared * n + torch.arange(n, device=positions.device)


def spatial_distances(distances: Tensor, order: Tensor, near: int, alpha: float) -> Tensor:
    """Feature distances that grow with the rank in the image, infinite beyond the ``near`` nearest.

    Args:
        distances: ``[B, n, n]``, distances of features.
        order: ``[B|1, n, n]``, see `spatial_order`.
        near: Number of tokens at a finite distance.
        alpha: The distance to the token of rank ``r`` (0 for itself) is multiplied by
            ``alpha + (1 - alpha) r / near``.

    Returns:
        ``[B, n, n]``.
    """
    first = order.topk(near, dim=2, largest=False, sorted=True).indices
    rank = torch.arange(near, device=order.device, dtype=distances.dtype)
    near_factor = (alpha + (1 - alpha) * rank / near).expand(first.shape)
    factor = distances.new_full(order.shape, float("inf")).scatter(2, first, near_factor)
    # not only the product, as zero times infinity is NaN
    return torch.where(factor.isinf(), factor, distances * factor)


def to_reachable(local: Tensor, order: Tensor, centres: Tensor) -> Tensor:
    """The cluster of every token, ``[B, n]``.

    If all ``centres`` ``[B, m]`` are at infinite distance, it is the one nearest in the image.
    """
    columns = centres[:, None].expand(-1, local.shape[1], -1)
    reachable = local.gather(2, columns).isfinite().any(2)
    nearest = to_nearest(order.expand_as(local), centres)
    return torch.where(reachable, to_nearest(local, centres), nearest)


def with_detail(assign: Tensor, residual: Tensor, x: Tensor) -> Tensor:
    """Values ``[B, n, C]`` of every token: those of its cluster ``[B, m, C]`` plus its residual."""
    return gather_tokens(x, assign) + residual
