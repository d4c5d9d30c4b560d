"""Adaptive Token Sampling for efficient Vision Transformers (ECCV 2022, arXiv 2111.15667)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsiattn import (
    InvalidOption,
    InvalidType,
    Reduction,
    Site,
    TokenInputs,
    TokenStrategy,
    check_budget,
    count_of,
)

Keep = int | float | Sequence[int | float] | Callable[[Site], int | float]


@dataclass(frozen=True)
class ATS(TokenStrategy):
    """Samples tokens where the cumulative significance, class attention times norm of the value,
    crosses evenly spaced levels; a token hit twice is there once, so images keep own numbers.

    keep: the most tokens to keep, share or count, one for all layers, a list, or a function of the
    `Site`. static: keep exactly so many, the most significant ones filling up where levels fell on
    one token; needed by `torch.compile` and export. Models without class tokens are scored by
    the attention of the mean query.

    >>> ATS(keep=0.5, static=True).is_ragged()
    False
    """

    name = "ats"
    needs_attention = True
    exact_at_full = False
    inexact_reason = "significant tokens are hit by several levels, so fewer than the budget stay"
    paper = "https://arxiv.org/abs/2111.15667"
    fidelity = (
        "as published code: scores sorted ascending, norm of the joined heads' values; sampling "
        "levels (2j - 1) / 2K; its least count of 8 tokens is left out; images of a "
        "batch are packed, not padded; static=True is our own"
    )

    keep: Keep = 0.7
    static: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for keep in self.keep if isinstance(self.keep, (list, tuple)) else [self.keep]:
            if not callable(keep):
                check_budget(keep, "keep")
        if not isinstance(self.static, bool):
            raise InvalidType(f"static must be True or False, got {self.static!r}")

    def default_layers(self, depth: int) -> tuple[int, ...]:
        """From a quarter of the depth to the end: blocks 3 to 11 of 12, as published."""
        return tuple(range(depth // 4, depth))

    def is_ragged(self) -> bool:
        return not self.static

    def check(self, tokens: int, first: bool) -> None:
        if isinstance(self.keep, int) and self.keep > tokens and first:
            raise InvalidOption(f"keep={self.keep} is more than the {tokens} patch tokens there")

    def reduce(self, tokens: TokenInputs) -> Reduction | None:
        scores = significance(tokens)
        assert isinstance(self.keep, (int, float))
        count = count_of(self.keep, tokens.count)
        if self.static and count == tokens.count:
            return None
        hit = sampled(scores, count)
        if self.static:
            return Reduction.top(scores + hit.to(scores.dtype), count)
        return Reduction.where(hit)


def significance(tokens: TokenInputs) -> Tensor:
    """``[B, n]``, summing to one: class attention times the norm of the value, section 3.1."""
    inputs = tokens.attention
    assert inputs is not None
    rows = tokens.class_attention() if tokens.class_tokens else tokens.mean_attention()
    values = inputs.v[..., inputs.prefix :, :].float()
    scores = rows * values.square().sum((1, 3)).sqrt()
    return scores / scores.sum(1, keepdim=True).clamp_min(torch.finfo(torch.float).tiny)


def sampled(scores: Tensor, count: int) -> Tensor:
    """``[B, n]`` boolean: tokens whose cumulative score, in ascending order, is nearest to one of
    ``count`` levels ``(2j - 1) / (2 count)`` (section 3.2).

    >>> sampled(torch.tensor([[0.05, 0.6, 0.35]]), 2)
    tensor([[False,  True,  True]])
    """
    ordered, order = scores.sort(dim=1, stable=True)
    cumulative = ordered.cumsum(1)
    levels = (torch.arange(count, device=scores.device) + 0.5) / count
    # the nearest entry is told by how many midpoints between neighbours lie below: counted, as ONNX
    # knows no searchsorted
    between = (cumulative[:, 1:] + cumulative[:, :-1]) / 2
    nearest = (between[:, None] < levels.to(between)[:, None]).sum(-1)
    return torch.zeros_like(scores, dtype=torch.bool).scatter(1, order.gather(1, nearest), True)
