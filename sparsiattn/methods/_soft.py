"""What learned soft mergers share: every new token is a weighted mean of all old ones."""

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
    """Base of strategies whose number of new tokens is a size of their weights.

    Args:
        keep: Share of the patch tokens present (``ceil``) or count, one for all layers or a list.
            As weights are made when a model is patched, a function of the `Site` must return a
            count.
    """

    place = "entry"
    exact_at_full = False
    inexact_reason = "every new token is a learned mix of all tokens, at any budget"
    needs_training = True

    def merges(self) -> bool:
        return True

    def resolve_for(self, site: Site, position: int, count: int) -> SoftMerger:
        """This config with ``keep`` as the count of tokens after layer ``position``."""
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
        """Tokens to make; for a config that `resolve_for` returned."""
        assert isinstance(self.keep, int)
        return self.keep


class SoftPlanner(LearnedTokenPlanner):
    """Base of planners that mix tokens by weights; override `weights`."""

    def weights(self, x: Tensor) -> Tensor:
        """``[B, m, n]``, whose rows sum to one, for tokens ``[B, n, C]``."""
        raise NotImplementedError(f"{type(self).__name__} must override weights(x)")

    def forward(self, tokens: TokenInputs) -> Reduction:
        return Reduction.mix(tokens.x, self.weights(tokens.x))
