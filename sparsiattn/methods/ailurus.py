"""AiluRus (NeurIPS 2023, arXiv 2311.01197): fewer tokens where an image is uniform, for dense
prediction."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor

from sparsiattn import InvalidOption, Reduction, TokenInputs, check_budget, count_of
from sparsiattn.methods.clusters import (
    Clustering,
    between,
    check_count,
    check_flag,
    precise,
    to_nearest,
)
from sparsiattn.methods.dpc_knn import density_peaks


@dataclass(frozen=True)
class AiluRus(Clustering):
    """Merges tokens into representatives near by, runs the other blocks on those, and gives every
    position its representative's output.

    Representatives are density peaks (see `density_peaks`) under feature distances that grow with
    the distance in the image: times ``alpha + (1 - alpha) rank / neighbours`` for the ``rank``-th
    nearest token in the image, infinite beyond ``neighbours`` of them. alpha: factor of the nearest
    one, from 0 to 1. neighbours: share or count of the tokens. k: nearest neighbours that make the
    density. proportional: a merged token weighs as a key by the patches in it. detail: give every
    position also what it differed from its cluster by when it was merged (not in the paper).
    layers: the blocks at whose entry tokens are merged; one, a twelfth into the depth, where None.

    >>> AiluRus(keep=0.4).layers_in(24)
    (2,)
    """

    name = "ailurus"
    suite = MappingProxyType({"ordered": True})  # what is near in the image decides
    paper = "https://arxiv.org/abs/2311.01197"
    fidelity = (
        "inspired by: no code was published; the distances' spatial factor and its constants "
        "(alpha, neighbours, k) are a reconstruction, and detail is our own"
    )
    place = "entry"

    k: int = 5
    alpha: float = 0.5
    neighbours: int | float = 0.25
    proportional: bool = True
    detail: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("k", self.k)
        if not (isinstance(self.alpha, (int, float)) and 0 <= self.alpha <= 1):
            raise InvalidOption(f"alpha must be a number in [0, 1], got {self.alpha!r}")
        check_budget(self.neighbours, "neighbours")
        check_flag("proportional", self.proportional)
        check_flag("detail", self.detail)

    def default_layers(self, depth: int) -> tuple[int, ...]:
        return (min(max(1, depth // 12), depth - 1),)

    def proportional_attention(self) -> bool:
        return self.proportional

    def cluster(self, tokens: TokenInputs, count: int) -> Reduction:
        near = count_of(self.neighbours, tokens.count)
        order = spatial_order(tokens.positions(), tokens.grid[1])
        distances = (between(precise(tokens.x)) / tokens.x.shape[-1]).sqrt()
        local = spatial_distances(distances, order, near, self.alpha)
        centres = density_peaks(local, count, min(self.k, near))
        assign = to_reachable(local, order, centres)
        merged = Reduction.merge(tokens.x, assign, centres, tokens.size)
        if not self.detail:
            return merged
        assert merged.values is not None
        residual = tokens.x - rows_of(merged.values, assign)
        return replace(merged, unfold=partial(with_detail, assign, residual))


def spatial_order(positions: Tensor, columns: int) -> Tensor:
    """``[B|1, n, n]``: integers that sort the tokens ``j`` by their distance in the image from each
    token ``i``, those equally far by number; from patch numbers ``[B|1, n]``."""
    row, column = positions // columns, positions % columns
    squared = (row[:, :, None] - row[:, None]).square()
    squared = squared + (column[:, :, None] - column[:, None]).square()
    n = positions.shape[1]
    return squared * n + torch.arange(n, device=positions.device)


def spatial_distances(distances: Tensor, order: Tensor, near: int, alpha: float) -> Tensor:
    """``[B, n, n]``: distances times ``alpha + (1 - alpha) rank / near``, where ``rank`` is 0 for
    the token itself; infinite but for the ``near`` first by ``order``."""
    first = order.topk(near, dim=2, largest=False, sorted=True).indices
    rank = torch.arange(near, device=order.device, dtype=distances.dtype)
    factor = (alpha + (1 - alpha) * rank / near).expand(first.shape)
    nothing = distances.new_full(order.shape, float("inf"))
    factor = nothing.scatter(2, first, factor)
    return torch.where(factor.isinf(), factor, distances * factor)


def to_reachable(local: Tensor, order: Tensor, centres: Tensor) -> Tensor:
    """``[B, n]``: the cluster of every token; where all ``centres`` ``[B, m]`` are infinitely far,
    that of the nearest in the image."""
    columns = centres[:, None].expand(-1, local.shape[1], -1)
    reachable = local.gather(2, columns).isfinite().any(2)
    nearest = to_nearest(order.expand_as(local), centres)
    return torch.where(reachable, to_nearest(local, centres), nearest)


def with_detail(assign: Tensor, residual: Tensor, x: Tensor) -> Tensor:
    """``[B, n, C]``: the clusters' values ``[B, m, C]`` at every token, with its own residual."""
    return rows_of(x, assign) + residual


def rows_of(x: Tensor, assign: Tensor) -> Tensor:
    """``[B, n, C]``: of every token's cluster."""
    return x.gather(1, assign[..., None].expand(-1, -1, x.shape[-1]))
