"""Patterns that keep the keys of largest logit, which the kernel finds.

Finding them takes all logits of a query, and attention needs these anyway: a kernel that does both
in one pass writes no key list. Other kernels use lists that are made with torch.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sparsiattn.attention import geometry
from sparsiattn.attention.auto_options import auto_options
from sparsiattn.attention.budget import Budget, check_budget, count_of
from sparsiattn.attention.geometry import T, Tiles
from sparsiattn.attention.inputs import AttentionInputs
from sparsiattn.attention.key_lists import KeyIndex, KeyLists
from sparsiattn.attention.logits import products
from sparsiattn.attention.pattern import Ranked, SizedPattern


@dataclass(frozen=True, eq=False)
class TopLogits(SizedPattern):
    """Keep the keys of largest logit of every query, or, in a tile, those with the largest votes.

    A voter is the mean of a few neighbouring queries of the tile (with the host's bias averaged
    alike), and its vote for a key is its attention weight. A key is scored by its largest vote, so
    a key that one part of the tile needs is kept.

    Attributes:
        n_queries: Number of queries, prefix included.
        n_keys: Number of keys, prefix included.
        k: The budget.
        inputs: The operands of the call.
        in_blocks: Whether whole blocks of keys are kept, by the mean of their votes.
        summary: Pooled keys that stand for the dropped ones; None if there are none.
    """

    k: Budget
    inputs: AttentionInputs
    in_blocks: bool = False

    @staticmethod
    def of(inputs: AttentionInputs, k: Budget, *, in_blocks: bool = False) -> TopLogits:
        """The pattern of one call."""
        sizes = inputs.n_queries, inputs.n_keys
        # by keyword: Dynamo before torch 2.11 counts the keyword-only `summary` as positional
        return TopLogits(*sizes, k=check_budget(k), inputs=inputs, in_blocks=in_blocks)

    @property
    def score_count(self) -> int:
        """Number of scores from which keys are chosen, over all images and heads."""
        rows = self.n_queries if self.inputs.tiles is None else len(self.voters[1])
        return self.inputs.q.shape[:2].numel() * rows * self.n_keys

    def ranked(self) -> Ranked:
        """The same as `Ranked`, with the scores computed now."""
        inputs = self.inputs
        if inputs.tiles is None:
            scores = inputs.logits()
        elif self.votes:
            scores = self._votes()
        else:  # the mask differs between queries, so each one votes for itself
            scores = inputs.logits().softmax(-1)
        return Ranked(scores.shape[-2], self.n_keys, scores=scores, k=self.k)

    @property
    def votes(self) -> bool:
        """Whether queries of a tile can vote together: all of them may see the same keys."""
        allowed = self.inputs.allowed()
        return allowed is None or allowed.shape[-2] == 1

    @property
    def voters(self) -> tuple[Tiles, Tensor]:
        """The queries that vote together, and their order tile by tile; see `geometry.voters`."""
        return self._voter_table(geometry.voters)

    @property
    def voter_tokens(self) -> tuple[Tensor, Tensor]:
        """The queries of every voter, for compiled code; see `geometry.voter_tokens`."""
        return self._voter_table(geometry.voter_tokens)

    def _voter_table(self, build: Callable[..., T]) -> T:
        inputs = self.inputs
        # at least 2, for a tile that the user set where "auto" has none
        side = max(2, auto_options(inputs.n_queries).voter)
        sizes = inputs.query_grid, inputs.tile, side, inputs.views
        return geometry.table(build, *sizes, device=inputs.q.device)

    def _votes(self) -> Tensor:
        """The largest vote for every key, ``[B, H, T, Nk]``."""
        inputs, (squares, order) = self.inputs, self.voters
        assert inputs.tiles is not None
        voters = squares.mean(inputs.patch_queries).index_select(-2, order)
        logits = products(voters, inputs.k, inputs.scale)
        bias = inputs.bias
        if bias is not None and bias.shape[-2] > 1:
            bias = squares.mean(bias[..., inputs.prefix :, :].to(logits.dtype))
            bias = bias.index_select(-2, order)
        votes = inputs.replace(bias=bias).biased(logits).softmax(-1)
        return torch.amax(votes.unflatten(-2, (inputs.tiles.count, -1)), dim=-2)

    def to_mask(self) -> Tensor:
        return self.ranked().to_mask()

    def pairs(self) -> float:
        return float(self.n_queries * count_of(self.k, self.n_keys))


@dataclass(frozen=True, eq=False)
class TopKeys(KeyLists):
    """The best keys of every query, which the kernel finds; see `KeyLists`.

    Attributes:
        keys: Length of every list, K, prefix included.
        prefix: Number of leading keys, which are in every list.
        make_index: Makes the lists, ``[B, H, n, K]``, for kernels that need them.
    """

    keys: int
    prefix: int
    make_index: Callable[[], Tensor]
    dense_rows: int = 0
    _made: Tensor | None = field(default=None, init=False, repr=False)
    tiles = None

    @property
    def width(self) -> int:
        return self.keys

    def macs(self, dim: int, value_dim: int) -> float:
        # every logit is computed, including those of summary keys
        cells = 0 if self.summary is None else self.summary.count
        pooled = cells * self.n_keys * (dim + value_dim)
        return self.n_queries * (self.n_keys + cells) * dim + self.pairs() * value_dim + pooled

    @property
    def index(self) -> Tensor:  # type: ignore[override]
        """Ids of the keys, ``[B, H, n, K]``, made on first access."""
        # not `cached_property`, whose lock Dynamo cannot trace before Python 3.12
        if self._made is None:
            object.__setattr__(self, "_made", self.make_index())
        assert self._made is not None
        return self._made

    def listed(self) -> KeyIndex:
        """The same pattern with explicit lists."""
        return KeyIndex(
            self.n_queries,
            self.n_keys,
            index=self.index,
            dense_rows=self.dense_rows,
            summary=self.summary,
        )

    def describe(self) -> Hashable:
        summary = self.summary
        cells = 0 if summary is None else summary.count
        return self.n_queries, self.n_keys, self.keys, self.prefix, self.dense_rows, cells
