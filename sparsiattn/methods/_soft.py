"""What learned soft mergers share: every new token is a weighted mean of all old ones."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from sparsiattn import (
    InvalidOption,
    LearnedTokenPlanner,
    Reduction,
    Site,
    TokenInputs,
    TokenStrategy,
    check_budget,
    count_of,
)

Keep = int | float | Sequence[int | float] | Callable[[Site], int]


@dataclass(frozen=True)
class SoftMerger(TokenStrategy):
    """Base of strategies whose number of new tokens is a size of their weights.

    keep: share of the patch tokens present (``ceil``) or count, one for all layers or a list. As
    weights are made when a model is patched, a function of the `Site` must return a count.
    """

    place = "entry"
    exact_at_full = False
    inexact_reason = "every new token is a learned mix of all tokens, at any budget"
    needs_training = True

    keep: Keep = 0.7

    def __post_init__(self) -> None:
        super().__post_init__()
        for keep in self.keep if isinstance(self.keep, (list, tuple)) else [self.keep]:
            if not callable(keep):
                check_budget(keep, "keep")

    def merges(self) -> bool:
        return True

    def resolve_for(self, site: Site, position: int, count: int) -> SoftMerger:
        """This config with ``keep`` as the count of tokens after layer ``position``."""
        if callable(self.keep):
            found = self.keep(site)
            if type(found) is not int:
                raise InvalidOption(
                    f"{self.name}: keep as a function of the site must return a count, as weights "
                    f"are made at patch time; got {found!r}"
                )
            return replace(self, keep=check_budget(found, "keep"))
        tokens = site.grid[0] * site.grid[1]
        for earlier in range(position + 1):
            keep = self._one("keep", site, earlier, count)
            tokens = count_of(keep, tokens)
        return replace(self, keep=tokens)

    def check(self, tokens: int, first: bool) -> None:
        if isinstance(self.keep, int) and self.keep > tokens:
            raise InvalidOption(f"keep={self.keep} is more than the {tokens} patch tokens there")

    def count(self) -> int:
        """Tokens to make; of a config that `at` resolved."""
        assert isinstance(self.keep, int)
        return self.keep


class SoftPlanner(LearnedTokenPlanner):
    """Mixes by the weights ``[B, m, n]`` that `weights` finds, whose rows sum to one."""

    def weights(self, x: Tensor) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} must override weights(x)")

    def forward(self, tokens: TokenInputs) -> Reduction:
        return Reduction.mix(tokens.x, self.weights(tokens.x))


def generator(name: str) -> torch.Generator:
    """Initial weights are the same for the same site, and no global random state is involved."""
    return torch.Generator().manual_seed(zlib.crc32(name.encode()))


def linear(inputs: int, outputs: int, draws: torch.Generator) -> nn.Linear:
    """A linear layer with weights uniform in +-1/sqrt(inputs), no bias at first."""
    layer: nn.Linear = nn.utils.skip_init(nn.Linear, inputs, outputs)
    with torch.no_grad():
        bound = 1 / math.sqrt(inputs)
        layer.weight.uniform_(-bound, bound, generator=draws)
        layer.bias.zero_()
    return layer
