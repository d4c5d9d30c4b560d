"""Background: pooled keys that stand for what a pattern dropped."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from sparsiattn.attention.geometry import Grid


@dataclass(frozen=True, eq=False)
class Summary:
    """Pooled keys that stand for what a pattern dropped (the option ``background``).

    Attributes:
        cells: Cell of every key, ``[Nk]``; prefix keys carry the id ``count`` and belong to none.
        parts: Rows and columns of cells, G in all.
        bias: Logit of each pooled key, ``[B|1, H|1, R, G]`` for R pattern rows or patch queries:
            log of how many of the cell's keys were not selected, minus infinity if all were.
        allowed: Keys that may enter the mean, ``[B|1, H|1, Nq|1, Nk]``; None means all.
    """

    cells: Tensor
    parts: Grid
    bias: Tensor
    allowed: Tensor | None = None

    @property
    def count(self) -> int:
        """Cells, G."""
        return self.parts[0] * self.parts[1]

    @property
    def per_query(self) -> bool:
        """Whether the means differ between queries, as under a shifted window's mask."""
        return self.allowed is not None and self.allowed.shape[-2] > 1

    def members(self, dtype: torch.dtype) -> Tensor:
        """One-hot cell membership, ``[Nk, G]``."""
        ids = torch.arange(self.count, device=self.cells.device)
        return (self.cells[:, None] == ids).to(dtype)

    def weights(self, dtype: torch.dtype) -> Tensor:
        """Averages keys over each cell: ``[..., Nq|1, G, Nk]``, empty cells all zero."""
        member = self._averaged(dtype)
        return member / _counts(member).to(dtype)

    def _averaged(self, dtype: torch.dtype) -> Tensor:
        """One for every key that enters the mean of a cell, ``[..., Nq|1, G, Nk]``."""
        member = self.members(dtype).mT
        return member if self.allowed is None else member * self.allowed.unsqueeze(-2).to(dtype)

    def pool(self, x: Tensor) -> Tensor:
        """Means over cells, ``[B, H, Nk, D]`` to ``[B, H, G, D]``; not for `per_query` means."""
        if x.dtype.itemsize > 2:
            weights = self.weights(x.dtype)
            return (weights if self.allowed is None else weights.squeeze(-3)) @ x
        member = self._averaged(x.dtype)
        member = member if self.allowed is None else member.squeeze(-3)
        # 1 / count has too few digits in half precision, and a sum may overflow, so the product is
        # with a power of two near it
        count = _counts(member)
        power = torch.exp2(-count.log2().ceil())
        rows = (member * power.to(x.dtype)) @ x
        return (rows.float() / (count * power)).to(x.dtype)


def _counts(member: Tensor) -> Tensor:
    """Number of keys of each cell, ``[..., G, 1]``, at least 1; exact also in half precision."""
    dtype = torch.promote_types(member.dtype, torch.float32)
    return member.sum(-1, keepdim=True, dtype=dtype).clamp_min(1.0)


class CountedSummary(Summary):
    """A summary whose bias is the log of how many keys of each cell a list leaves out.

    The bias is computed on first access: a kernel that walks through the lists counts by itself
    and never reads it.

    Args:
        cells: Cell of every key, ``[Nk]``, as in `Summary`.
        parts: Rows and columns of cells.
        bias: The bias, or a function that computes it.
        allowed: Keys that may enter the mean, as in `Summary`.
    """

    def __init__(
        self,
        cells: Tensor,
        parts: Grid,
        bias: Tensor | Callable[[], Tensor],
        allowed: Tensor | None = None,
    ) -> None:
        # bypasses the frozen dataclass, so that `bias` stays unset where it is still a function
        name = "bias" if isinstance(bias, Tensor) else "count_bias"
        vars(self).update({"cells": cells, "parts": parts, "allowed": allowed, name: bias})

    @property
    def counted(self) -> bool:
        """Whether the bias is to be counted from the lists."""
        return "count_bias" in vars(self)

    @cached_property
    def bias(self) -> Tensor:
        return vars(self)["count_bias"]()  # type: ignore[no-any-return]
