"""What token strategies with a budget of tokens have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsiattn import InvalidOption, Site, TokenInputs, TokenStrategy, check_budget, count_of
from sparsiattn.methods._options import check_flags, constants

Keep = int | float | Sequence[int | float] | Callable[[Site], int | float]


@dataclass(frozen=True)
class BudgetedTokens(TokenStrategy):
    """Base of strategies that leave a share or a count of the patch tokens present.

    Args:
        keep: Tokens to leave, as a share (``ceil``) or count of those present: one for all
            layers, a list, or a function of the `Site`.
    """

    check_first_only: ClassVar[bool] = False
    """Whether a count may exceed what earlier reductions left."""

    keep: Keep = 0.7

    def __post_init__(self) -> None:
        super().__post_init__()
        for keep in constants(self.keep):
            check_budget(keep, "keep")
        check_flags(self)

    def resolve_for(self, site: Site, position: int, count: int) -> BudgetedTokens:
        resolved = super().resolve_for(site, position, count)
        assert isinstance(resolved, BudgetedTokens)
        check_budget(resolved.keep, "keep")  # of a function nothing was known before
        return resolved

    def proportional_attention(self) -> bool:
        return bool(getattr(self, "proportional", False))

    def check(self, tokens: int, first: bool) -> None:
        if self.check_first_only and not first:
            return
        if isinstance(self.keep, int) and self.keep > tokens:
            raise InvalidOption(f"keep={self.keep} is more than the {tokens} patch tokens there")

    def target_count(self, tokens: int) -> int:
        """Tokens to leave of so many; for a config that `resolve_for` returned."""
        assert isinstance(self.keep, (int, float))
        return count_of(self.keep, tokens)


def class_or_mean_attention(tokens: TokenInputs) -> Tensor:
    """``[B, n]``: attention of the class tokens, without any that of the mean patch query."""
    return tokens.class_attention() if tokens.class_tokens else tokens.mean_attention()


def unit_keys(tokens: TokenInputs) -> Tensor:
    """``[B, n, D]``: the direction of every patch's mean key over heads."""
    inputs = tokens.attention
    assert inputs is not None
    # the mean over heads has the direction of their sum
    return F.normalize(precise(inputs.k).sum(1)[:, inputs.prefix :], dim=-1)


def gather_tokens(x: Tensor, index: Tensor) -> Tensor:
    """``[B, m, C]``: the tokens of ``x`` ``[B, n, C]`` at ``index`` ``[B, m]``."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


def precise(x: Tensor) -> Tensor:
    """``x`` without gradient, in single precision at least."""
    return x.detach() if x.dtype == torch.float64 else x.detach().float()


def full_precision(x: Tensor) -> AbstractContextManager[object]:
    """A block in which autocast does not round matrix products."""
    if x.device.type == "meta":  # of a dry run: autocast knows no such device
        return nullcontext()
    return torch.autocast(x.device.type, enabled=False)
