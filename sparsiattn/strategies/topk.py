"""The strategy `topk`: exact top-k of the attention matrix, an oracle for cheaper choices."""

from __future__ import annotations

from dataclasses import dataclass, field

from sparsiattn.attention.budget import Budget
from sparsiattn.attention.geometry import Sides
from sparsiattn.attention.inputs import AttentionInputs
from sparsiattn.attention.pattern import Pattern
from sparsiattn.attention.top_logits import TopLogits
from sparsiattn.strategies.base import Budgets, Strategy


@dataclass(frozen=True)
class TopK(Strategy):
    """The keys with the largest attention weight (an oracle: it computes all logits to choose).

    With tiles, the keys with the largest mean weight over the tile's queries are kept: the shared
    set with the most attention mass. This needs the softmax of all logits, so by default every
    query has its own keys.

    Args:
        k: Share or count of the keys, one for all sites, a list, or a function of the `Site`.
        tile: As in `Strategy`; 1 by default.
    """

    name = "topk"
    paper = "https://arxiv.org/abs/2106.00515"
    fidelity = (
        "as published (k-NN attention), but without training; tiles and summary keys are "
        "this library's"
    )
    plans_by_shape = True
    supports_frames = True

    k: Budgets = 0.25
    tile: int | Sides | str = field(default=1, kw_only=True)

    def plan(self, inputs: AttentionInputs) -> Pattern:
        k: Budget = self.k  # type: ignore[assignment]
        # softmax preserves the order within a row, so single queries do not need it
        if inputs.tiles is None:
            return TopLogits.of(inputs, k)
        return Pattern.top(inputs.logits().softmax(-1), k)
