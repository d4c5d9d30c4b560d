"""Base class of token strategies with a budget of tokens, and shared functions."""

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
    """Base of strategies that keep a share or a count of the patch tokens present.

    Args:
        keep: Share (``ceil``) or count of the patch tokens present to keep: one for all layers, a
            list, or a function of the `Site`.
    """

    check_first_only: ClassVar[bool] = False
    """Whether a count may exceed the number of tokens that earlier reductions left."""

    keep: Keep = 0.7

    def __post_init__(self) -> None:
        super().__post_init__()
        for keep in constants(self.keep):
            check_budget(keep, "keep")
        check_flags(self)

    def resolve_for(self, site: Site, position: int, count: int) -> BudgetedTokens:
        resolved = super().resolve_for(site, position, count)
        assert isinstance(resolved, BudgetedTokens)
        check_budget(resolved.keep, "keep")  # the result of a function was not checked before
        return resolved

    def proportional_attention(self) -> bool:
        return bool(getattr(self, "proportional", False))

    def check(self, tokens: int, first: bool) -> None:
        if self.check_first_only and not first:
            return
        if isinstance(self.keep, int) and self.keep > tokens:
            raise InvalidOption(
                f"keep must be at most {tokens}, the number of patch tokens there, got {self.keep}"
            )

    def target_count(self, tokens: int) -> int:
        """Number of tokens to keep; only for a config that `resolve_for` returned."""
        assert isinstance(self.keep, (int, float))
        return count_of(self.keep, tokens)


def class_or_mean_attention(tokens: TokenInputs) -> Tensor:
    """Attention of the class tokens, ``[B, n]``; of the mean patch query if there are none."""
    return tokens.class_attention() if tokens.class_tokens else tokens.mean_attention()


def unit_keys(tokens: TokenInputs) -> Tensor:
    """Unit vectors of every patch's mean key over heads, ``[B, n, D]``."""
    inputs = tokens.attention
    assert inputs is not None
    # the sum over heads has the same direction as the mean
    return F.normalize(precise(inputs.k).sum(1)[:, inputs.prefix :], dim=-1)


def gather_tokens(x: Tensor, index: Tensor) -> Tensor:
    """The tokens ``[B, m, C]`` of ``x`` ``[B, n, C]`` at ``index`` ``[B, m]``."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


def precise(x: Tensor) -> Tensor:
    """``x`` without gradient, in float32 or float64."""
    return x.detach() if x.dtype == torch.float64 else x.detach().float()


def full_precision(x: Tensor) -> AbstractContextManager[object]:
    """A with block in which autocast does not round matrix products."""
    if x.device.type == "meta":  # a dry run: autocast does not support this device
        return nullcontext()
    return torch.autocast(x.device.type, enabled=False)
