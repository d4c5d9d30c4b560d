"""The strategy, which selects the keys of each query."""

from __future__ import annotations

from dataclasses import dataclass

from sparsiattn import AttentionInputs, Pattern, Strategy
from torch.nn.functional import normalize


@dataclass(frozen=True)
class NearestKeys(Strategy):
    """Each query attends to the keys with the largest cosine similarity.

    Prefix tokens, tiles, background and the full budget are handled by the library.

    Attributes:
        k: Keys kept per query, a share in (0, 1] or a count.
    """

    name = "nearest_keys"

    k: float = 0.25

    def plan(self, inputs: AttentionInputs) -> Pattern:
        scores = normalize(inputs.q, dim=-1) @ normalize(inputs.k, dim=-1).mT
        return Pattern.top(scores, self.k)
