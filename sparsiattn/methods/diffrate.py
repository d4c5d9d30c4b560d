"""Dropping and merging in one step, at rates found per block (DiffRate, ICCV 2023, arXiv
2305.17997), written from the paper's description."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

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
from sparsiattn.methods.clusters import check_flag, precise

Keep = int | float | Sequence[int | float] | Callable[[Site], int | float]
Share = float | Sequence[float] | Callable[[Site], float]


@dataclass(frozen=True)
class DiffRate(TokenStrategy):
    """Of the least attended tokens some are dropped and the others merged into the most alike.

    keep: tokens that a layer leaves, share or count, one for all layers, a list, or a function of
    the `Site`; `sparsiattn.search` finds one for every block from unlabelled images, in place of
    the paper's differentiable rates. drop: the share of what goes that is dropped, the least
    attended; the others go to the nearest token that stays, by the cosine of the block's keys. 0
    only merges, 1 only drops; a list or a function, too. proportional: a merged token weighs as a
    key by the patches in it. Models without class tokens are scored by the mean query's attention.

    >>> DiffRate(keep=[0.9, 0.8], layers=[4, 8], drop=0.25).layers_in(12)
    (4, 8)
    """

    name = "diffrate"
    paper = "https://arxiv.org/abs/2305.17997"
    fidelity = (
        "inspired by: rates per block are searched (sparsiattn search) instead of learned with the "
        "gradient, and the paper's code was not looked at for its licence"
    )
    per_layer = ("keep", "drop")
    needs_attention = True

    keep: Keep = 0.7
    drop: Share = 0.5
    proportional: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for keep in _each(self.keep):
            check_budget(keep, "keep")
        for drop in _each(self.drop):
            if isinstance(drop, bool) or not isinstance(drop, (int, float)):
                raise InvalidType(f"drop must be a number from 0 to 1, got {drop!r}")
            if not 0 <= drop <= 1:
                raise InvalidOption(f"drop must be a number from 0 to 1, got {drop!r}")
        check_flag("proportional", self.proportional)

    def proportional_attention(self) -> bool:
        return self.proportional

    def merges(self) -> bool:
        return True

    def check(self, tokens: int, first: bool) -> None:
        if isinstance(self.keep, int) and self.keep > tokens and first:
            raise InvalidOption(f"keep={self.keep} is more than the {tokens} patch tokens there")

    def reduce(self, tokens: TokenInputs) -> Reduction | None:
        inputs, n = tokens.attention, tokens.count
        assert inputs is not None
        assert isinstance(self.keep, (int, float))
        assert isinstance(self.drop, (int, float))
        count = count_of(self.keep, n)
        if count == n:
            return None
        seen = tokens.class_attention() if tokens.class_tokens else tokens.mean_attention()
        order = seen.argsort(dim=1, descending=True, stable=True)
        stay = order[:, :count].sort(dim=1).values
        moved = order[:, count : n - round(self.drop * (n - count))]
        # the direction of the mean over heads is that of their sum
        keys = F.normalize(precise(inputs.k).sum(1)[:, inputs.prefix :], dim=-1)
        target = (_at(keys, moved) @ _at(keys, stay).mT).argmax(-1)
        return gathered(tokens, stay, moved, target)


def gathered(tokens: TokenInputs, stay: Tensor, moved: Tensor, target: Tensor) -> Reduction:
    """Tokens ``stay`` ``[B, m]``, with those of ``moved`` ``[B, r]`` merged into the ``target``-th
    of them by size; the rest is dropped."""
    weight = tokens.size
    if weight is None:
        weight = torch.ones_like(tokens.x[..., 0], dtype=torch.float32)
    size = weight.gather(1, stay).scatter_add(1, target, weight.gather(1, moved))
    heavy = tokens.x * weight[..., None].to(tokens.x.dtype)
    into = target[..., None].expand(-1, -1, heavy.shape[-1])
    values = _at(heavy, stay).scatter_add(1, into, _at(heavy, moved))
    place = torch.arange(stay.shape[1], device=stay.device).expand_as(stay)
    gone = torch.full_like(weight, -1, dtype=torch.long)
    return Reduction.cluster(
        stay,
        gone.scatter(1, stay, place).scatter(1, moved, target),
        values=values / size[..., None].to(values.dtype),
        size=size,
    )


def _at(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


def _each(option: object) -> list[object]:
    several = option if isinstance(option, (list, tuple)) else [option]
    return [value for value in several if not callable(value)]
