"""DiffRate: dropping and merging in one step, with a rate for each block.

ICCV 2023, arXiv 2305.17997, implemented from the paper's description.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparsiattn import Reduction, Site, TokenInputs
from sparsiattn.methods._options import check_number, constants
from sparsiattn.methods._tokens import (
    BudgetedTokens,
    class_or_mean_attention,
    gather_tokens,
    unit_keys,
)

Share = float | Sequence[float] | Callable[[Site], float]


@dataclass(frozen=True)
class DiffRate(BudgetedTokens):
    """Drops some of the least attended tokens, and merges others into the most similar kept ones.

    Models without class tokens use the mean query's attention.

    Args:
        keep: Share or count of tokens that a layer keeps: one for all layers, a list, or a function
            of the `Site`. `sparsiattn.search` finds a value for every block from unlabelled images,
            instead of the paper's differentiable rates.
        drop: Share of the removed tokens that are dropped, the least attended first (also a list or
            a function). The others are merged into the most similar kept token by the cosine of the
            block's keys. 0 only merges, 1 only drops.
        proportional: Whether attention weights a merged token by its number of patches.

    >>> DiffRate(keep=[0.9, 0.8], layers=[4, 8], drop=0.25).layers_in(12)
    (4, 8)
    """

    name = "diffrate"
    paper = "https://arxiv.org/abs/2305.17997"
    fidelity = (
        "inspired by: rates per block are searched (sparsiattn search) instead of learned by "
        "gradient; the paper's code was not consulted because of its licence"
    )
    per_layer = ("keep", "drop")
    needs_attention = True
    check_first_only = True

    drop: Share = 0.5
    proportional: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for drop in constants(self.drop):
            check_number("drop", drop, 0, 1)

    def merges(self) -> bool:
        return True

    def reduce(self, tokens: TokenInputs) -> Reduction | None:
        n, count = tokens.count, self.target_count(tokens.count)
        assert isinstance(self.drop, (int, float))
        if count == n:
            return None
        attention = class_or_mean_attention(tokens)
        order = attention.argsort(dim=1, descending=True, stable=True)
        stay = order[:, :count].sort(dim=1).values
        moved = order[:, count : n - round(self.drop * (n - count))]
        keys = unit_keys(tokens)
        target = (gather_tokens(keys, moved) @ gather_tokens(keys, stay).mT).argmax(-1)
        return merged_into(tokens, stay, moved, target)


def merged_into(tokens: TokenInputs, stay: Tensor, moved: Tensor, target: Tensor) -> Reduction:
    """Keep some tokens, merge others into them weighted by size, and drop the rest.

    Args:
        tokens: All tokens.
        stay: ``[B, m]``, indices of the kept tokens.
        moved: ``[B, r]``, indices of the merged tokens.
        target: ``[B, r]``, for every merged token the position in ``stay`` that it is merged into.
    """
    members = torch.cat([stay, moved], dim=1)
    place = torch.arange(stay.shape[1], device=stay.device).expand_as(stay)
    assign = torch.cat([place, target], dim=1)
    size = None if tokens.size is None else tokens.size.gather(1, members)
    merged = Reduction.merge(gather_tokens(tokens.x, members), assign, stay, size)
    dropped = torch.full_like(tokens.x[..., 0], -1, dtype=torch.long)
    return replace(merged, assign=dropped.scatter(1, members, assign))
