"""The strategy `dense`: keeps every key, a baseline that measures the overhead of patching."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

from sparsiattn.attention.inputs import AttentionInputs
from sparsiattn.attention.pattern import Pattern
from sparsiattn.strategies.base import Strategy


@dataclass(frozen=True)
class DenseStrategy(Strategy):
    """Keeps every key: the host's own attention, called through the patch."""

    name = "dense"
    suite = MappingProxyType({"changes": False})  # a law of the test suite that does not apply

    def keeps_all(self, n_keys: int) -> bool:
        return True

    def plan(self, inputs: AttentionInputs) -> Pattern:
        return Pattern.dense(inputs.n_queries, inputs.n_keys)
