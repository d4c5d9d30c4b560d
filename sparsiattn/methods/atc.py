"""Agglomerative Token Clustering: the closest clusters of tokens are merged, pair by pair.

ECCV 2024, arXiv 2409.11923, implemented from the paper.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsiattn import InvalidOption, Reduction, Site, TokenInputs
from sparsiattn.methods._options import check_count, constants
from sparsiattn.methods._tokens import full_precision, unit_keys
from sparsiattn.methods.clusters import Clustering

LINKAGES = ("average", "complete", "single")

MergedTokens = int | Sequence[int] | Callable[[Site], int] | None


@dataclass(frozen=True)
class ATC(Clustering):
    """Merges the closest clusters of tokens, pair by pair, until the budget is reached.

    Similarity is the cosine of the block's keys, averaged over heads.

    All images are clustered together on the device, in ``n - m`` steps of one argmin each, with
    memory ``[B, n, n]``. Compiled and exported programs contain the steps as one operator,
    ``sparsiattn::agglomerate``; to load such a program, import `sparsiattn` first.

    Args:
        keep: See `Clustering`; `published_counts` returns the counts in the paper's tables.
        linkage: Whether the distance of two clusters is the ``"average"``, ``"complete"``
            (largest) or ``"single"`` (smallest) distance of their tokens.
        proportional: Whether attention weights a merged token by its number of patches.
        r: Number of tokens to merge at each layer instead of ``keep``: an int, a list, or a
            function of the `Site`. If ``layers`` is None it applies to all blocks, the paper's
            setting without training.

    >>> ATC(keep=[137, 96, 67], layers=[3, 6, 9], linkage="complete").layers_in(12)
    (3, 6, 9)
    """

    name = "atc"
    paper = "https://arxiv.org/abs/2409.11923"
    fidelity = (
        "as published; means are always weighted by size, also without proportional attention, "
        "where the published code ignores sizes"
    )
    per_layer = ("keep", "r")
    needs_attention = True

    linkage: str = "average"
    proportional: bool = True
    r: MergedTokens = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.linkage not in LINKAGES:
            raise InvalidOption(f"linkage must be one of {LINKAGES}, got {self.linkage!r}")
        for r in constants(self.r) if self.r is not None else ():
            check_count("r", r, 0)

    def default_layers(self, depth: int) -> tuple[int, ...]:
        return super().default_layers(depth) if self.r is None else tuple(range(depth))

    def check(self, tokens: int, first: bool) -> None:
        if self.r is None:
            super().check(tokens, first)
        elif isinstance(self.r, int) and self.r >= tokens:
            raise InvalidOption(
                f"r must be below {tokens}, the number of patch tokens there, got {self.r}"
            )

    def target_count(self, tokens: int) -> int:
        if self.r is None:
            return super().target_count(tokens)
        assert isinstance(self.r, int)
        return max(1, tokens - self.r)

    def cluster(self, tokens: TokenInputs, count: int) -> Reduction:
        label = agglomerate(cosine_distances(unit_keys(tokens)), count, self.linkage)
        index, assign = numbered(label, count)
        return Reduction.merge(tokens.x, assign, index, tokens.size)


def cosine_distances(keys: Tensor) -> Tensor:
    """One minus the cosine of unit vectors ``[B, n, D]``: ``[B, n, n]``.

    NaN, which keys that overflowed give, becomes a distance larger than any other.
    """
    with full_precision(keys):
        cosine = keys @ keys.mT
    return (1 - cosine).clamp(0, 2).nan_to_num(nan=4.0)


@torch.library.custom_op(
    "sparsiattn::agglomerate",
    mutates_args=(),
    schema="(Tensor distances, int clusters, str linkage) -> Tensor",
)
def agglomerate(distances: Tensor, clusters: int, linkage: str) -> Tensor:
    """Agglomerative clustering of a batch with the updates of Lance and Williams (1967).

    Of equally close pairs, the first in raster order is merged.

    Args:
        distances: ``[B, n, n]``; only the upper triangle is used.
        clusters: Number of clusters.
        linkage: One of `LINKAGES`.

    Returns:
        ``[B, n]``, for every token the smallest token index in its cluster.

    >>> points = torch.tensor([0.0, 1.0, 5.0, 5.5, 9.0])
    >>> agglomerate((points - points[:, None]).abs()[None], 3, "average").tolist()
    [[0, 0, 2, 2, 4]]
    """
    batch, n, _ = distances.shape
    upper = distances.triu(1)
    matrix = upper + upper.mT
    matrix.diagonal(dim1=1, dim2=2).fill_(float("inf"))
    images = torch.arange(batch, device=matrix.device)
    label = torch.arange(n, device=matrix.device).repeat(batch, 1)
    size = matrix.new_ones(batch, n)
    for _ in range(n - clusters):
        # the first minimum of a symmetric matrix is above its diagonal: i < j
        i = matrix.amin(2).argmin(1)
        j = matrix[images, i].argmin(1)
        share = size[images, i] / (size[images, i] + size[images, j])
        row = _linked(matrix[images, i], matrix[images, j], share[:, None], linkage)
        row[images, i] = row[images, j] = float("inf")
        matrix[images, i] = matrix[images, :, i] = row
        matrix[images, j] = matrix[images, :, j] = float("inf")
        size[images, i] += size[images, j]
        label = torch.where(label == j[:, None], i[:, None], label)
    return label


def _linked(a: Tensor, b: Tensor, share: Tensor, linkage: str) -> Tensor:
    """Distances from the union of two clusters, ``[B, n]``.

    ``share`` is the share of its tokens that are in the first cluster.
    """
    if linkage == "single":
        return torch.minimum(a, b)
    if linkage == "complete":
        return torch.maximum(a, b)
    return share * a + (1 - share) * b


@agglomerate.register_fake
def _(distances: Tensor, clusters: int, linkage: str) -> Tensor:
    return distances.new_empty(distances.shape[:2], dtype=torch.long)


def numbered(label: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """Number the clusters of labels ``[B, n]`` that `agglomerate` returned.

    Returns:
        The smallest token index of every cluster ``[B, m]``, ascending, and the number of every
        token's cluster ``[B, n]``.
    """
    token = torch.arange(label.shape[1], device=label.device)
    lowest = label == token
    index = torch.where(lowest, token, label.shape[1]).sort(1).values[:, :clusters]
    return index, (lowest.cumsum(1) - 1).gather(1, label)
