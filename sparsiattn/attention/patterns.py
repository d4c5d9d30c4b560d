"""Patterns: which (query, key) pairs survive, as tensors.

A planner returns `Dense`, `Mask`, `KeyIndex` or `Ranked`. The last one is a wish (scores and a
budget) that the core turns into a `KeyIndex` or `KeyBlocks` once prefix tokens, tiles and the
host's masks are taken into account; the others are what kernels compute, and so is `Lengths`, the
pattern of images with different numbers of tokens. Plans that choose no keys are in
`sparsiattn.attention.derived`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparsiattn.attention.background import Summary
from sparsiattn.attention.geometry import Tiles
from sparsiattn.errors import InvalidOption, InvalidType

if TYPE_CHECKING:
    from sparsiattn.attention.site import AttentionInputs

Budget = int | float


def check_budget(k: object, name: str = "k") -> Budget:
    """``k`` itself if it is a share in (0, 1] or a count >= 1, else an error that calls it
    ``name``.

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


def blocks_within(k: Budget, n_keys: int, prefix: int, blocks: Tiles) -> int:
    """Blocks of patch keys that a list of ``count_of(k, n_keys)`` keys reaches into after its
    ``prefix`` leading ones; 0 where those use the list up, and where it holds every key."""
    keys = count_of(k, n_keys)
    if keys <= prefix or keys == n_keys:
        return 0
    return min(blocks.count, -(-(keys - prefix) // blocks.smallest))


class Pattern:
    """Which of ``n_queries`` x ``n_keys`` pairs survive, and what stands for the others.

    Planners make one with `dense`, `mask`, `index`, `top`, and those of
    `sparsiattn.attention.derived`.

    >>> Pattern.top(torch.tensor([[[[0.1, 0.7, 0.2]]]]), 2).to_mask().tolist()
    [[[[False, True, True]]]]
    """

    n_queries: int
    n_keys: int
    summary: Summary | None = None

    def to_mask(self) -> Tensor:
        """Boolean ``[B|1, H|1, Nq, Nk]``, True where the pair survives."""
        raise NotImplementedError

    def pairs(self) -> float | None:
        """Logits computed per head, summary included; None if only the values tell."""
        raise NotImplementedError

    def macs(self, dim: int, value_dim: int) -> float | None:
        """QK^T and AV of one head, pooling of the summary keys included; None as in `pairs`."""
        pairs = self.pairs()
        if pairs is None:
            return None
        pooled = 0 if self.summary is None else self.summary.count * self.n_keys
        return (pairs + pooled) * (dim + value_dim)

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
        per query tile; where ``inputs.blocks`` is not None there may be one column per block of
        patch keys instead of one per key. Inside a model the core adds what users asked for:
        prefix columns, tiles (rows are averaged where scores came per query), background.

        >>> scores = torch.tensor([[[[3.0, 1.0, 2.0]]]])
        >>> Pattern.top(scores, 2).to_mask().tolist()
        [[[[True, False, True]]]]
        """
        if scores.dim() != 4:
            raise InvalidType(
                f"Pattern.top needs [B|1, H|1, rows, keys] scores, got shape {tuple(scores.shape)}"
            )
        return Ranked(scores.shape[-2], scores.shape[-1], scores, check_budget(k))

    @staticmethod
    def computed_keys(
        inputs: AttentionInputs,
        k: Tensor,
        v: Tensor,
        *,
        q: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Pattern:
        """Patch queries attend to computed keys, and to nothing else; prefix queries stay dense.

        k: ``[B, H, M, D']``; v: ``[B, H, M, Dv]``; q: ``[B, H, n, D']`` in place of the n patch
        queries, where their width changes; bias: float or boolean, ``[B|1, H|1, n|1, M]``, in
        place of the host's. `AttentionInputs.scale` applies as ever. Set ``chooses = False`` on
        the strategy. Raises `InvalidOption` for shapes that do not fit.

        >>> from sparsiattn.testing.hosts import random_inputs
        >>> inputs = random_inputs((4, 4), prefix=1, dim=8)
        >>> mean = inputs.k.mean(-2, keepdim=True), inputs.v.mean(-2, keepdim=True)
        >>> Pattern.computed_keys(inputs, *mean).pairs()  # the prefix row sees 17 keys, 16 rows one
        33.0
        """
        from sparsiattn.attention.derived import over

        return over(inputs, k, v, q, bias)

    @staticmethod
    def logits(inputs: AttentionInputs, logits: Tensor) -> Pattern:
        """Attention by logits ``[B|1, H|1, Nq, Nk]`` that are known without QK^T; the host's bias
        is added to them. Set ``chooses = False`` on the strategy. Raises `InvalidOption` for
        shapes that do not fit."""
        from sparsiattn.attention.derived import by_logits

        return by_logits(inputs, logits)

    @staticmethod
    def output(inputs: AttentionInputs, value: Tensor) -> Pattern:
        """``value`` ``[B, H, Nq, Dv]`` in place of attention, of which nothing runs. Set ``chooses
        = False`` on the strategy. Raises `InvalidOption` for a shape that does not fit."""
        from sparsiattn.attention.derived import output

        return output(inputs, value)


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
    """Scores ``[B|1, H|1, R, Nk]`` and how many of the best to keep.

    best: where columns are blocks and the planner ranked them already, the places of the best of
    every row, best first, ``[B|1, H|1, R, C]``.
    """

    n_queries: int
    n_keys: int
    scores: Tensor
    k: Budget
    best: Tensor | None = None

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


class KeyLists(Pattern):
    """A list of keys for every tile of queries; prefix queries see every key.

    tiles: how patch queries are grouped; None where every patch query has its own list.
    dense_rows: number of leading prefix queries. index: ``[B|1, H|1, T, K]``, ids of the keys.
    """

    index: Tensor
    tiles: Tiles | None
    dense_rows: int

    @property
    def width(self) -> int:
        """Keys of every list, K; summary keys not counted."""
        return self.index.shape[-1]

    def to_mask(self) -> Tensor:
        rows = scatter_true(self.index, self.n_keys)
        if self.tiles is not None:
            rows = self.tiles.spread(rows)
        if not self.dense_rows:
            return rows
        full = rows.new_ones(*rows.shape[:2], self.dense_rows, self.n_keys)
        return torch.cat([full, rows], dim=-2)

    def pairs(self) -> float:
        keys = self.width + (self.summary.count if self.summary else 0)
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


@dataclass(frozen=True, eq=False)
class KeyIndex(KeyLists):
    """Lists of single keys. index: ``[B|1, H|1, T, K]``; see `KeyLists`."""

    n_queries: int
    n_keys: int
    index: Tensor
    tiles: Tiles | None = None
    dense_rows: int = 0
    summary: Summary | None = None


@dataclass(frozen=True, eq=False)
class KeyBlocks(KeyLists):
    """Lists of key blocks, the layout of block-sparse kernels; see `KeyLists`.

    chosen: ``[B|1, H|1, T, C]``, ids of blocks, best first. blocks: the patch keys of every block,
    as compact tiles of their grid. keys: length of every list; it begins with the ``prefix``
    leading keys, and the last block that it reaches gives only as many keys as are still missing.
    """

    n_queries: int
    n_keys: int
    chosen: Tensor
    blocks: Tiles
    keys: int
    prefix: int = 0
    tiles: Tiles | None = None
    dense_rows: int = 0
    summary: Summary | None = None

    @property
    def width(self) -> int:
        return self.keys

    @property
    def index(self) -> Tensor:  # type: ignore[override]
        """Ids of the keys, ``[B|1, H|1, T, K]``: the prefix, then block by block."""
        keys = self.blocks.order[self.chosen].flatten(-2) + self.prefix
        if not self.blocks.even:
            keys = keys.gather(-1, self._present())
        keys = keys[..., : self.keys - self.prefix]
        first = torch.arange(self.prefix, device=keys.device).expand(*keys.shape[:-1], -1)
        return torch.cat([first, keys], dim=-1) if self.prefix else keys

    def _present(self) -> Tensor:
        """Places of the slots that hold a token, in order, before those that repeat one."""
        absent = (self.blocks.weight == 0)[self.chosen].flatten(-2)
        return absent.to(torch.uint8).argsort(dim=-1, stable=True)


def scatter_true(index: Tensor, n_keys: int) -> Tensor:
    """Indices ``[..., R, K]`` to a boolean ``[..., R, n_keys]``."""
    return torch.zeros(*index.shape[:-1], n_keys, dtype=torch.bool, device=index.device).scatter(
        -1, index, True
    )
