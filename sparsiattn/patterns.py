"""Patterns: which (query, key) pairs survive, as tensors.

A planner returns `Dense`, `Mask`, `KeyIndex` or `Ranked`. The last one is a wish (scores and a
budget) that the core turns into a `KeyIndex` once prefix tokens, tiles and the host's masks are
taken into account; the others are what kernels compute, and so is `Lengths`, the pattern of images
with different numbers of tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsiattn.errors import InvalidOption, InvalidType
from sparsiattn.geometry import Tiles

Budget = int | float


def check_budget(k: object, name: str = "k") -> Budget:
    """``k`` itself if it is a share in (0, 1] or a count >= 1, else an error that says so.

    >>> check_budget(0.1), check_budget(20)
    (0.1, 20)
    """
    wanted = f"{name} must be a float in (0, 1] (a share) or an int >= 1 (a count)"
    if isinstance(k, bool) or not isinstance(k, (int, float)):
        raise InvalidType(f"{wanted}, got {k!r} of type {type(k).__name__}")
    if isinstance(k, int) and k < 1:
        raise InvalidOption(f"{wanted}, got {k!r}")
    if isinstance(k, float) and not 0.0 < k <= 1.0:  # also refuses NaN
        raise InvalidOption(f"{wanted}, got {k!r}")
    return k


def count_of(k: Budget, n: int) -> int:
    """Keys kept out of ``n``: ``ceil(k * n)`` for a share, at most ``n`` for a count.

    >>> count_of(0.1, 197), count_of(20, 197), count_of(500, 197)
    (20, 20, 197)
    """
    return min(k, n) if isinstance(k, int) else max(1, min(n, math.ceil(k * n)))


@dataclass(frozen=True, eq=False)
class Summary:
    """Pooled keys that stand for what a pattern dropped (design: `background`).

    cells: cell of every key, ``[Nk]``; prefix keys carry the id ``count`` and belong to none.
    count: number of cells G. bias: logit of each pooled key, ``[B|1, H|1, R, G]`` for R pattern
    rows or patch queries: log of how many of the cell's keys were not selected, minus infinity if
    all were. allowed: keys that may enter the mean, ``[B|1, H|1, Nq|1, Nk]``; None means all.
    """

    cells: Tensor
    count: int
    bias: Tensor
    allowed: Tensor | None = None

    @property
    def per_query(self) -> bool:
        """Whether the means differ between queries, as under a shifted window's mask."""
        return self.allowed is not None and self.allowed.shape[-2] > 1

    def members(self, dtype: torch.dtype) -> Tensor:
        """One-hot cell membership, ``[Nk, G]``."""
        ids = torch.arange(self.count, device=self.cells.device)
        return (self.cells[:, None] == ids).to(dtype)

    def weights(self, dtype: torch.dtype) -> Tensor:
        """Averages keys over each cell: ``[..., Nq|1, G, Nk]``, empty cells all zero."""
        member = self.members(dtype).mT
        if self.allowed is not None:
            member = member * self.allowed.unsqueeze(-2).to(dtype)
        return member / member.sum(-1, keepdim=True).clamp_min(1.0)

    def pool(self, x: Tensor) -> Tensor:
        """Means over cells, ``[B, H, Nk, D]`` to ``[B, H, G, D]``; not for `per_query` means."""
        weights = self.weights(x.dtype)
        return (weights if self.allowed is None else weights.squeeze(-3)) @ x


class Pattern:
    """Which of ``n_queries`` x ``n_keys`` pairs survive, and what stands for the others."""

    n_queries: int
    n_keys: int
    summary: Summary | None = None

    def to_mask(self) -> Tensor:
        """Boolean ``[B|1, H|1, Nq, Nk]``, True where the pair survives."""
        raise NotImplementedError

    def pairs(self) -> float | None:
        """Logits computed per head, summary included; None if only the values tell."""
        raise NotImplementedError

    def summary_rows(self) -> Tensor | None:
        """The summary's logit for every query, ``[B|1, H|1, Nq, G]``; None without a summary."""
        return None if self.summary is None else self.summary.bias

    @staticmethod
    def dense(n_queries: int, n_keys: int) -> Pattern:
        """Every pair survives."""
        return Dense(n_queries, n_keys)

    @staticmethod
    def mask(mask: Tensor) -> Pattern:
        """The pairs where a boolean ``[B|1, H|1, Nq, Nk]`` is True."""
        if mask.dtype != torch.bool or mask.dim() != 4:
            raise InvalidType(
                f"Pattern.mask needs a boolean [B|1, H|1, Nq, Nk] tensor, got {mask.dtype} of "
                f"shape {tuple(mask.shape)}; compare your scores with a threshold first"
            )
        return Mask(mask.shape[-2], mask.shape[-1], mask)

    @staticmethod
    def top(scores: Tensor, k: Budget) -> Pattern:
        """The ``ceil(k * Nk)`` (or, as a count, ``k``) best-scored keys of every row.

        scores: ``[B|1, H|1, R, Nk]`` with one row per query, per patch query (prefix left out), or
        per query tile. Inside a model the core adds what users asked for: prefix columns, tiles
        (rows are averaged where scores came per query), background.

        >>> scores = torch.tensor([[[[3.0, 1.0, 2.0]]]])
        >>> Pattern.top(scores, 2).to_mask().tolist()
        [[[[True, False, True]]]]
        """
        if scores.dim() != 4:
            raise InvalidType(
                f"Pattern.top needs [B|1, H|1, rows, keys] scores, got shape {tuple(scores.shape)}"
            )
        return Ranked(scores.shape[-2], scores.shape[-1], scores, check_budget(k))


@dataclass(frozen=True, eq=False)
class Dense(Pattern):
    """Every pair."""

    n_queries: int
    n_keys: int

    def to_mask(self) -> Tensor:
        return torch.ones(1, 1, self.n_queries, self.n_keys, dtype=torch.bool)

    def pairs(self) -> float:
        return float(self.n_queries * self.n_keys)


@dataclass(frozen=True, eq=False)
class Lengths(Pattern):
    """Images of different lengths in one sequence: every query sees the keys of its own image.

    lengths: tokens of each image; they add up to ``n_queries`` and to ``n_keys``.
    """

    n_queries: int
    n_keys: int
    lengths: tuple[int, ...]

    def to_mask(self) -> Tensor:
        counts = torch.tensor(self.lengths)
        image = torch.repeat_interleave(torch.arange(len(counts)), counts)
        return (image[:, None] == image)[None, None]

    def pairs(self) -> float:
        return float(sum(n * n for n in self.lengths))


@dataclass(frozen=True, eq=False)
class Ranked(Pattern):
    """Scores ``[B|1, H|1, R, Nk]`` and how many of the best to keep."""

    n_queries: int
    n_keys: int
    scores: Tensor
    k: Budget

    def select(self) -> Tensor:
        """Indices of the kept keys, ``[B|1, H|1, R, K]``, in no order."""
        return self.scores.topk(count_of(self.k, self.n_keys), dim=-1, sorted=False).indices

    def to_mask(self) -> Tensor:
        return scatter_true(self.select(), self.n_keys)

    def pairs(self) -> float:
        return float(self.n_queries * count_of(self.k, self.n_keys))


@dataclass(frozen=True, eq=False)
class Mask(Pattern):
    """A boolean mask ``[B|1, H|1, Nq, Nk]``."""

    n_queries: int
    n_keys: int
    keep: Tensor
    summary: Summary | None = None

    def to_mask(self) -> Tensor:
        return self.keep

    def pairs(self) -> float | None:
        if self.keep.device.type == "meta":
            return None
        extra = self.summary.count * self.n_queries if self.summary else 0
        return float(self.keep.float().mean()) * self.n_queries * self.n_keys + extra


@dataclass(frozen=True, eq=False)
class KeyIndex(Pattern):
    """A list of keys for every tile of queries; prefix queries see every key.

    index: ``[B|1, H|1, T, K]``, ids of keys. tiles: how patch queries are grouped; None where
    every patch query has its own list. dense_rows: number of leading prefix queries.
    """

    n_queries: int
    n_keys: int
    index: Tensor
    tiles: Tiles | None = None
    dense_rows: int = 0
    summary: Summary | None = None

    def to_mask(self) -> Tensor:
        rows = scatter_true(self.index, self.n_keys)
        if self.tiles is not None:
            rows = self.tiles.spread(rows)
        if not self.dense_rows:
            return rows
        full = rows.new_ones(*rows.shape[:2], self.dense_rows, self.n_keys)
        return torch.cat([full, rows], dim=-2)

    def pairs(self) -> float:
        keys = self.index.shape[-1] + (self.summary.count if self.summary else 0)
        patches = self.n_queries - self.dense_rows
        return float(self.dense_rows * self.n_keys + patches * keys)

    def summary_rows(self) -> Tensor | None:
        if self.summary is None:
            return None
        bias = self.summary.bias
        if self.tiles is not None and bias.shape[-2] != self.n_queries - self.dense_rows:
            bias = self.tiles.spread(bias)
        if not self.dense_rows:
            return bias
        # prefix queries see every key, so nothing stands for what they dropped
        none = bias.new_full((*bias.shape[:2], self.dense_rows, bias.shape[-1]), float("-inf"))
        return torch.cat([none, bias], dim=-2)


def scatter_true(index: Tensor, n_keys: int) -> Tensor:
    """Indices ``[..., R, K]`` to a boolean ``[..., R, n_keys]``."""
    return torch.zeros(*index.shape[:-1], n_keys, dtype=torch.bool, device=index.device).scatter(
        -1, index, True
    )
