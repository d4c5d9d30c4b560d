"""Key lists of a few heads at a time, where those of all heads would take too much memory."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from sparsiattn.attention.budget import count_of
from sparsiattn.attention.inputs import AttentionInputs
from sparsiattn.strategies.base import Planner, Strategy

MOST_ENTRIES = 1 << 26
"""Entries of the key lists that exist at once: 512 MiB of int64."""


def heads_at_once(planner: Planner, strategy: Strategy, inputs: AttentionInputs) -> int:
    """Number of heads that are planned and computed together.

    All of them, unless the lists of tiles would have more than `MOST_ENTRIES` entries. Heads are
    split only where plans depend on shapes and options alone (other planners may compare heads),
    and not in traced programs.
    """
    heads, k = inputs.q.shape[1], getattr(strategy, "k", None)
    if torch.compiler.is_compiling():  # a traced program may be for any batch size
        return heads
    by_shape = getattr(planner, "plans_by_shape", False)
    if isinstance(inputs.tile, int) or not by_shape or not isinstance(k, (int, float)):
        return heads
    # fewer tiles than there are would only make the groups larger
    lists = inputs.n_queries // math.prod(inputs.tile)
    keys = count_of(strategy.budget_for(inputs.n_keys), inputs.n_keys)
    entries = inputs.q.shape[0] * lists * keys
    return min(heads, max(1, MOST_ENTRIES // max(1, entries)))


def head_groups(inputs: AttentionInputs, size: int) -> Iterator[tuple[slice, AttentionInputs]]:
    """The call for each group of at most ``size`` heads, and which heads these are."""
    for first in range(0, inputs.q.shape[1], size):
        heads = slice(first, first + size)
        q, k, v = (x[:, heads] for x in (inputs.q, inputs.k, inputs.v))
        yield heads, inputs.replace(q=q, k=k, v=v, bias=_of_heads(inputs.bias, heads))


def _of_heads(bias: Tensor | None, heads: slice) -> Tensor | None:
    return bias if bias is None or bias.shape[1] == 1 else bias[:, heads]
