"""Base classes of learned soft mergers: every new token is a weighted mean of all old tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from sparsiattn import (
    InvalidOption,
    LearnedTokenPlanner,
    Reduction,
    Site,
    TokenInputs,
    check_budget,
)
from sparsiattn.methods._tokens import BudgetedTokens


@dataclass(frozen=True)
class SoftMerger(BudgetedTokens):
    """Base of strategies whose number of new tokens is a dimension of their weights.

    Args:
        keep: Share (``ceil``) or count of the patch tokens present, one for all layers or a list. A
            function of the `Site` must return a count, as weights are made at patch time.
    """

    place = "entry"
    exact_at_full = False
    inexact_reason = "every new token is a learned mix of all tokens, at any budget"
    needs_training = True

    def merges(self) -> bool:
        return True

    def resolve_for(self, site: Site, position: int, count: int) -> SoftMerger:
        """A copy with ``keep`` set to the number of tokens after layer ``position``."""
        if callable(self.keep):
            tokens = self.keep(site)
            if type(tokens) is not int:
                raise InvalidOption(
                    f"{self.name}: keep as a function of the site must return a count, as weights "
                    f"are made at patch time; got {tokens!r}"
                )
            return replace(self, keep=check_budget(tokens, "keep"))
        tokens = site.grid[0] * site.grid[1]
        for earlier in range(position + 1):
            tokens = super().resolve_for(site, earlier, count).target_count(tokens)
        return replace(self, keep=tokens)

    def count(self) -> int:
        """Number of tokens to make; only for a config that `resolve_for` returned."""
        assert isinstance(self.keep, int)
        return self.keep


class SoftPlanner(LearnedTokenPlanner):
    """Base of planners that mix tokens by weights: override `weights`."""

    def weights(self, x: Tensor) -> Tensor:
        """Weights ``[B, m, n]`` for tokens ``[B, n, C]``; every row sums to one."""
        raise NotImplementedError(f"{type(self).__name__} must override weights(x)")

    def forward(self, tokens: TokenInputs) -> Reduction:
        return Reduction.mix(tokens.x, self.weights(tokens.x))
