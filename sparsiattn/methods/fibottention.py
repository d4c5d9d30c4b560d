"""Fibottention: every head attends to tokens at offsets of its own Fibonacci-like sequence.

Fibottention, arXiv 2406.19391.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsiattn import InvalidOption, Planner, Site, Strategy
from sparsiattn.methods._grid import Grid, GridPlanner
from sparsiattn.methods._options import check_count, check_flags

Offsets = tuple[int, ...]


@dataclass(frozen=True)
class Fibottention(Strategy):
    """Patch j attends to patch k if |j - k|, in raster order, is in the head's list of offsets.

    Head i = 1..H starts at the Wythoff pair ``a = floor(floor(i phi) phi)``, ``b = floor(floor(i
    phi) phi^2)`` and continues a, b, a + b, ... up to its window ``w_i = w_min + floor((w_max -
    w_min) (i - 1) / (H - 1))`` (sections 3.2 and 3.3 of the paper). Prefix tokens attend to all
    tokens, and all attend to them. Without prefix tokens every patch also attends to itself, as the
    sequences do not contain 0.

    In windowed models offsets are within one window. By design, offsets wrap across rows of the
    image. The mask is ``[1, H, N, N]``, as rows at the border have fewer keys.

    Args:
        w_min: Window of the first head, in tokens.
        w_max: Window of the last head; None for a third of the patches.
        modified: Whether to add the two terms before a and b, which may be 0.
        shuffle: Whether to shuffle the heads of every layer, seeded by the layer's index.

    Raises:
        InvalidOption: ``w_max < w_min``.

    >>> offsets(heads=6, patches=196)[:2]
    ((1, 2, 3, 5), (4, 7, 11))
    >>> Fibottention(modified=True).to_dict()["options"]["w_min"]
    5
    """

    name = "fibottention"
    paper = "https://arxiv.org/abs/2406.19391"
    fidelity = (
        "as published: exact offsets, other pairs masked as in the paper (its first code sets "
        "their logits to zero); heads are shuffled by another generator"
    )
    needs_training = True
    exact_at_full = False
    inexact_reason = "offsets grow like Fibonacci numbers: no option keeps every key"

    w_min: int = 5
    w_max: int | None = None
    modified: bool = False
    shuffle: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("w_min", self.w_min)
        if self.w_max is not None:
            check_count("w_max", self.w_max)
            if self.w_max < self.w_min:
                raise InvalidOption(
                    f"w_max must be None or at least w_min = {self.w_min}, got {self.w_max}"
                )
        check_flags(self)

    def planner(self, site: Site) -> Planner:
        order = torch.arange(site.heads)
        if self.shuffle:
            order = torch.randperm(site.heads, generator=torch.Generator().manual_seed(site.index))
        # without prefix keys, a patch without neighbours would have no key at all
        itself = not (site.prefix_tokens and self.prefix_keys)
        return GridPlanner(offset_pairs, (self, tuple(order.tolist()), itself))


def offset_pairs(
    grid: Grid, options: Fibottention, order: tuple[int, ...], itself: bool, *, device: torch.device
) -> Tensor:
    """Pairs of patches at one of their head's offsets.

    Args:
        grid: Rows and columns of patches.
        options: The strategy with its windows and ``modified``.
        order: Index of the sequence of each head.
        itself: Whether every patch also attends to itself.
        device: Device of the mask.

    Returns:
        ``[H, n, n]``.
    """
    n = grid[0] * grid[1]
    sequences = offsets(len(order), n, options.w_min, options.w_max, options.modified)
    first = (0,) if itself else ()
    return banded(tuple((*first, *sequences[head]) for head in order), n, device=device)


def offsets(
    heads: int, patches: int, w_min: int = 5, w_max: int | None = None, modified: bool = False
) -> tuple[Offsets, ...]:
    """The distinct offsets of every head, ascending.

    A head whose sequence starts beyond its window gets offset 1.
    """
    last = patches // 3 if w_max is None else w_max
    sequences = []
    for i in range(1, heads + 1):
        share = (i - 1) / (heads - 1) if heads > 1 else 1.0
        limit = min(w_min + int((last - w_min) * share), patches - 1)
        sequences.append(_sequence(*wythoff(i), limit, modified) or (1,))
    return tuple(sequences)


def wythoff(i: int) -> tuple[int, int]:
    """The first pair of row i of the Wythoff array.

    >>> wythoff(1), wythoff(12)
    ((1, 2), (30, 49))
    """
    phi = (1 + math.sqrt(5)) / 2
    return math.floor(math.floor(i * phi) * phi), math.floor(math.floor(i * phi) * phi**2)


def _sequence(a: int, b: int, limit: int, modified: bool) -> Offsets:
    if modified:
        a, b = a - (b - a), b - a
    terms: set[int] = set()
    while min(a, b) <= limit:
        terms.update(term for term in (a, b) if term <= limit)
        a, b = b, a + b
    return tuple(sorted(terms))


def banded(lists: tuple[Offsets, ...], n: int, *, device: torch.device) -> Tensor:
    """Pairs of n tokens at one of a head's offsets, ``[H, n, n]``."""
    distance = torch.arange(1 - n, n, device=device).abs()
    near = torch.zeros(len(lists), 2 * n - 1, dtype=torch.bool, device=device)
    for head, head_offsets in enumerate(lists):
        for offset in head_offsets:
            near[head] |= distance == offset
    # row j has the offsets k - j for k = 0 to n - 1: a run of n values that starts at n - 1 - j
    return near.unfold(-1, n, 1).flip(-2)
