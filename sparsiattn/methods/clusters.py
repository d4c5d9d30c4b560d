"""What the clusterings of tokens have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsiattn import (
    InvalidOption,
    InvalidType,
    Reduction,
    Site,
    TokenInputs,
    TokenStrategy,
    check_budget,
    count_of,
)

Keep = int | float | Sequence[int | float] | Callable[[Site], int | float]


@dataclass(frozen=True)
class Clustering(TokenStrategy):
    """A token strategy that puts one token in the place of every cluster: override `cluster`.

    keep: clusters, as a share (``ceil``) or count of the patch tokens present: one for all layers,
    a list, or a function of the `Site`. Budgets that keep every token change nothing.
    """

    keep: Keep = 0.7

    def __post_init__(self) -> None:
        super().__post_init__()
        for keep in self.keep if isinstance(self.keep, (list, tuple)) else [self.keep]:
            if not callable(keep):
                check_budget(keep, "keep")

    def merges(self) -> bool:
        return True

    def resolve_for(self, site: Site, position: int, count: int) -> TokenStrategy:
        one = super().resolve_for(site, position, count)
        assert isinstance(one, Clustering)
        check_budget(one.keep, "keep")
        return one

    def check(self, tokens: int, first: bool) -> None:
        if isinstance(self.keep, int) and self.keep > tokens:
            raise InvalidOption(f"keep={self.keep} is more than the {tokens} patch tokens there")

    def clusters(self, tokens: int) -> int:
        """Clusters to make of so many tokens."""
        assert isinstance(self.keep, (int, float))
        return count_of(self.keep, tokens)

    def reduce(self, tokens: TokenInputs) -> Reduction | None:
        count = self.clusters(tokens.count)
        return None if count >= tokens.count else self.cluster(tokens, count)

    def cluster(self, tokens: TokenInputs, count: int) -> Reduction:
        """The reduction to ``count`` tokens, fewer than there are."""
        raise NotImplementedError(f"{type(self).__name__} must override cluster(tokens, count)")


def published_counts(tokens: int, rate: float, times: int) -> list[int]:
    """Patch tokens after each of so many reductions in the ATC and TokenReduction papers: a power
    of the rate of those at the start, rounded down. Give them as ``keep``.

    >>> published_counts(196, 0.7, 3)
    [137, 96, 67]
    """
    return [int(tokens * rate ** (i + 1)) for i in range(times)]


def precise(x: Tensor) -> Tensor:
    """``x`` without gradient, in single precision at least."""
    return x.detach() if x.dtype == torch.float64 else x.detach().float()


def full_precision(x: Tensor) -> AbstractContextManager[object]:
    """A block in which autocast does not round matrix products."""
    if x.device.type == "meta":  # of a dry run
        return nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """``[B, n, m]``: squared Euclidean distances of ``[B, n, C]`` to ``[B, m, C]``, by one matrix
    product, not negative."""
    middle = a.mean(1, keepdim=True)  # smaller norms, less cancellation
    a, b = a - middle, b - middle
    with full_precision(a):
        product = a @ b.mT
    return (a.square().sum(-1)[..., None] + b.square().sum(-1)[:, None] - 2 * product).clamp_min(0)


def between(x: Tensor) -> Tensor:
    """``[B, n, n]``: squared Euclidean distances within ``[B, n, C]``, zero on the diagonal."""
    own = torch.eye(x.shape[1], dtype=torch.bool, device=x.device)
    return squared_distances(x, x).masked_fill(own, 0.0)


def to_nearest(distances: Tensor, centres: Tensor) -> Tensor:
    """``[B, n]``: the cluster of every token, by distances ``[B, n, n]`` to the tokens ``centres``
    ``[B, m]``, each of which is in its own."""
    columns = centres[:, None].expand(-1, distances.shape[1], -1)
    assign = distances.gather(2, columns).argmin(2)
    own = torch.arange(centres.shape[1], device=centres.device)
    return assign.scatter(1, centres, own.expand_as(centres))


def check_flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise InvalidType(f"{name} must be True or False, got {value!r}")


def check_count(name: str, value: object) -> None:
    if type(value) is not int or value < 1:
        raise InvalidOption(f"{name} must be an int >= 1, got {value!r}")
