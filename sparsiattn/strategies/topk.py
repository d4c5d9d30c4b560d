"""Exact top-k of the attention matrix: the oracle every cheaper choice is measured against."""

from __future__ import annotations

from dataclasses import dataclass

from sparsiattn.attention.inputs import AttentionInputs
from sparsiattn.attention.pattern import Pattern
from sparsiattn.strategies.base import Budgets, Strategy


@dataclass(frozen=True)
class TopK(Strategy):
    """The keys with the largest attention weight (an oracle: it computes all logits to choose).

    In tile mode the keys with the largest mean weight over the tile's queries, which is the shared
    set that keeps the most attention mass.

    Args:
        k: Share or count of the keys, one for all sites, a list, or a function of the `Site`.
    """

    name = "topk"
    paper = "https://arxiv.org/abs/2106.00515"
    fidelity = (
        "as published (k-NN attention), which trains with it; tiles and summary keys are "
        "this library's"
    )

    k: Budgets = 0.25

    def plan(self, inputs: AttentionInputs) -> Pattern:
        logits = inputs.logits()
        # the softmax keeps each row's order, so one query alone does not need it
        scores = logits if inputs.tiles is None else logits.softmax(-1)
        return Pattern.top(scores, self.k)  # type: ignore[arg-type]
