"""Base class and functions of clustering methods, which replace every cluster by one token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsiattn import Reduction, TokenInputs
from sparsiattn.methods._tokens import BudgetedTokens, full_precision


@dataclass(frozen=True)
class Clustering(BudgetedTokens):
    """A token strategy that replaces every cluster by one token: override `cluster`.

    Args:
        keep: Number of clusters, as a share (``ceil``) or count of the patch tokens present: one
            for all layers, a list, or a function of the `Site`. Budgets that keep every token
            change nothing.
    """

    def merges(self) -> bool:
        return True

    def reduce(self, tokens: TokenInputs) -> Reduction | None:
        count = self.target_count(tokens.count)
        return None if count >= tokens.count else self.cluster(tokens, count)

    def cluster(self, tokens: TokenInputs, count: int) -> Reduction:
        """The reduction to ``count`` tokens, which is less than the present number."""
        raise NotImplementedError(f"{type(self).__name__} must override cluster(tokens, count)")


def published_counts(tokens: int, rate: float, times: int) -> list[int]:
    """Patch tokens after each reduction in the ATC and TokenReduction papers, for ``keep``.

    Args:
        tokens: Number of patch tokens at the start.
        rate: The paper's keep rate; the i-th count is ``tokens * rate ** i``, rounded down.
        times: Number of reductions.

    >>> published_counts(196, 0.7, 3)
    [137, 96, 67]
    """
    return [int(tokens * rate ** (i + 1)) for i in range(times)]


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """Squared Euclidean distances from ``[B, n, C]`` to ``[B, m, C]``: ``[B, n, m]``.

    They are computed with one matrix product and clamped to at least 0.
    """
    middle = a.mean(1, keepdim=True)  # smaller norms, less cancellation
    a, b = a - middle, b - middle
    with full_precision(a):
        product = a @ b.mT
    return (a.square().sum(-1)[..., None] + b.square().sum(-1)[:, None] - 2 * product).clamp_min(0)


def pairwise_distances(x: Tensor) -> Tensor:
    """Squared Euclidean distances within ``[B, n, C]``: ``[B, n, n]``, zero on the diagonal."""
    diagonal = torch.eye(x.shape[1], dtype=torch.bool, device=x.device)
    return squared_distances(x, x).masked_fill(diagonal, 0.0)


def to_nearest(distances: Tensor, centres: Tensor) -> Tensor:
    """The cluster of every token, ``[B, n]``: the one with the nearest centre.

    Args:
        distances: ``[B, n, n]``.
        centres: ``[B, m]``, indices of the centres; each centre is in its own cluster.
    """
    columns = centres[:, None].expand(-1, distances.shape[1], -1)
    assign = distances.gather(2, columns).argmin(2)
    cluster = torch.arange(centres.shape[1], device=centres.device)
    return assign.scatter(1, centres, cluster.expand_as(centres))


def ranks(order: Tensor) -> Tensor:
    """The rank of every token in an ``order`` of tokens, both ``[B, n]``."""
    place = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, place)
