"""Adaptive Token Sampling: the number of tokens per image depends on its attention.

ECCV 2022, arXiv 2111.15667.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsiattn import Reduction, TokenInputs
from sparsiattn.methods._tokens import BudgetedTokens, class_or_mean_attention


@dataclass(frozen=True)
class ATS(BudgetedTokens):
    """Samples tokens where the cumulative significance, class attention times norm of the value,
    crosses evenly spaced levels.

    A token that several levels hit is kept once, so images keep different numbers of tokens. Models
    without class tokens use the attention of the mean query.

    Args:
        keep: Largest share or count of tokens to keep: one for all layers, a list, or a function of
            the `Site`.
        static: Whether to keep exactly this many, adding the most significant tokens if levels
            hit a token twice; needed by `torch.compile` and export.

    >>> ATS(keep=0.5, static=True).is_ragged()
    False
    """

    name = "ats"
    needs_attention = True
    check_first_only = True
    exact_at_full = False
    inexact_reason = "several levels hit the same token, so fewer tokens than the budget stay"
    paper = "https://arxiv.org/abs/2111.15667"
    fidelity = (
        "as published code: scores sorted ascending, norm of the values of all heads together, "
        "sampling levels (2j - 1) / 2K; without its minimum of 8 tokens; images of a batch are "
        "packed, not padded; static=True is an addition"
    )

    static: bool = False

    def default_layers(self, depth: int) -> tuple[int, ...]:
        """Blocks from a quarter of the depth to the end: 3 to 11 of 12, as published."""
        return tuple(range(depth // 4, depth))

    def is_ragged(self) -> bool:
        return not self.static

    def reduce(self, tokens: TokenInputs) -> Reduction | None:
        scores, count = significance(tokens), self.target_count(tokens.count)
        if self.static and count == tokens.count:
            return None
        hit = sampled(scores, count)
        if self.static:
            return Reduction.top(scores + hit.to(scores.dtype), count)
        return Reduction.where(hit)


def significance(tokens: TokenInputs) -> Tensor:
    """Class attention times the norm of the value, ``[B, n]``, summing to one (section 3.1)."""
    inputs = tokens.attention
    assert inputs is not None
    values = inputs.v[..., inputs.prefix :, :].float()
    scores = class_or_mean_attention(tokens) * values.square().sum((1, 3)).sqrt()
    return scores / scores.sum(1, keepdim=True).clamp_min(torch.finfo(torch.float).tiny)


def sampled(scores: Tensor, count: int) -> Tensor:
    """The tokens whose cumulative score is nearest to one of evenly spaced levels (section 3.2).

    Args:
        scores: ``[B, n]``; they are accumulated in ascending order.
        count: Number of levels, which are at ``(2j - 1) / (2 count)``.

    Returns:
        Boolean ``[B, n]``.

    >>> sampled(torch.tensor([[0.05, 0.6, 0.35]]), 2)
    tensor([[False,  True,  True]])
    """
    ordered, order = scores.sort(dim=1, stable=True)
    cumulative = ordered.cumsum(1)
    levels = (torch.arange(count, device=scores.device) + 0.5) / count
    # the index of the nearest entry is the number of midpoints between neighbours below the level;
    # counted, as ONNX has no searchsorted
    midpoints = (cumulative[:, 1:] + cumulative[:, :-1]) / 2
    nearest = (midpoints[:, None] < levels.to(midpoints)[:, None]).sum(-1)
    return torch.zeros_like(scores, dtype=torch.bool).scatter(1, order.gather(1, nearest), True)
