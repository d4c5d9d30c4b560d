"""Background: pooled keys that stand for what a pattern dropped."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsiattn.attention import geometry
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
        source: The grid of patch keys and the number of prefix keys that ``cells`` was made from,
            so that the weights of means are cached; None for cells of another kind.
    """

    cells: Tensor
    parts: Grid
    bias: Tensor
    allowed: Tensor | None = None
    source: tuple[Grid, int] | None = None

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
        weights, divisor = self._pooling(x.dtype)
        rows = weights @ x
        # the quotient of a half precision number and a float32 number is a float32 number
        return rows if divisor is None else (rows / divisor).to(x.dtype)

    def _pooling(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """`pooling_weights` of these cells."""
        if self.allowed is not None:
            return pooling_weights(self._averaged(dtype).squeeze(-3))
        if self.source is None:
            return pooling_weights(self._averaged(dtype))
        grid, prefix = self.source
        key = grid, self.parts, prefix, dtype
        return geometry.table(_pooling_of_grid, *key, device=self.cells.device)


def pooling_weights(member: Tensor) -> tuple[Tensor, Tensor | None]:
    """Weights ``[..., G, Nk]`` whose product with keys, over a divisor, is the mean of every cell.

    1 / count has too few digits in half precision, and a sum may overflow. There the weights are a
    power of two near it, and the divisor ``[..., G, 1]`` is what is left of the count.

    Args:
        member: One for every key that enters the mean of a cell, ``[..., G, Nk]``.
    """
    count = _counts(member)
    if member.dtype.itemsize > 2:
        return member / count.to(member.dtype), None
    power = torch.exp2(-count.log2().ceil())
    return member * power.to(member.dtype), count * power


def _pooling_of_grid(
    grid: Grid, parts: Grid, prefix: int, dtype: torch.dtype, *, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """`pooling_weights` of all cells of a grid; no divisor if it is one everywhere."""
    ids = torch.arange(parts[0] * parts[1], device=device)
    member = (key_cells(grid, parts, prefix, device=device)[:, None] == ids).to(dtype)
    weights, divisor = pooling_weights(member.mT)
    return weights, None if _counts_are_powers(grid, parts) else divisor


def _counts_are_powers(grid: Grid, parts: Grid) -> bool:
    """Whether every cell holds a power of two of keys; unknown, so False, for symbolic sizes."""
    if not all(type(size) is int for size in (*grid, *parts)):
        return False
    for size, cells in zip(grid, parts, strict=True):
        ends = [-(-size * i // cells) for i in range(cells + 1)]
        sides = [ends[i + 1] - ends[i] for i in range(cells)]
        if any(side & (side - 1) for side in sides):
            return False
    return True


def key_cells(grid: Grid, parts: Grid, prefix: int, *, device: torch.device) -> Tensor:
    """The cell of every key, ``[P + n]``, with an additional last cell for prefix keys.

    >>> key_cells((2, 4), (1, 2), 1, device=torch.device("cpu")).tolist()
    [2, 0, 0, 1, 1, 0, 0, 1, 1]
    """
    ids = geometry.cell_ids(grid, parts, device=device)
    return torch.cat([ids.new_full((prefix,), parts[0] * parts[1]), ids])


def key_counts(grid: Grid, parts: Grid, prefix: int, *, device: torch.device) -> Tensor:
    """How many keys every cell holds, ``[G + 1]`` float32, that of the prefix last."""
    cells = key_cells(grid, parts, prefix, device=device)
    total = torch.zeros(parts[0] * parts[1] + 1, device=device)
    return total.index_add(0, cells, torch.ones_like(cells, dtype=total.dtype))


def cell_members(
    grid: Grid, parts: Grid, prefix: int, *, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The keys of every cell, ``[G, s]``, and how many of them are distinct, ``[G]``.

    >>> cell_members((1, 4), (1, 2), 1, device=torch.device("cpu"))[0].tolist()
    [[1, 2], [3, 4]]
    """
    groups = geometry.tiles_of_parts(grid, parts, device=device)
    return groups.order + prefix, (groups.weight > 0).sum(-1)


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
        source: What the cells were made from, as in `Summary`.
    """

    _count_bias: Callable[[], Tensor] | None
    _made: Tensor | None

    def __init__(
        self,
        cells: Tensor,
        parts: Grid,
        bias: Tensor | Callable[[], Tensor],
        allowed: Tensor | None = None,
        source: tuple[Grid, int] | None = None,
    ) -> None:
        # bypasses the frozen dataclass, whose field `bias` is a property here
        count_bias, made = (None, bias) if isinstance(bias, Tensor) else (bias, None)
        known = {"cells": cells, "parts": parts, "allowed": allowed, "source": source}
        # one by one: Dynamo before torch 2.11 cannot trace `vars`
        for name, value in {**known, "_count_bias": count_bias, "_made": made}.items():
            object.__setattr__(self, name, value)

    @property
    def counted(self) -> bool:
        """Whether the bias is to be counted from the lists."""
        return self._count_bias is not None

    @property
    def bias(self) -> Tensor:
        # not `cached_property`, whose lock Dynamo cannot trace before Python 3.12
        if self._made is None:
            assert self._count_bias is not None
            object.__setattr__(self, "_made", self._count_bias())
        assert self._made is not None
        return self._made
