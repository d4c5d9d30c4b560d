"""Fibottention: every head sees the tokens at offsets of its own Fibonacci-like sequence."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsiattn import AttentionInputs, InvalidOption, Pattern, Planner, Site, Strategy
from sparsiattn.methods._fixed import check_count, check_flag, laid

Offsets = tuple[int, ...]


@dataclass(frozen=True)
class Fibottention(Strategy):
    """Patch j sees patch k if |j - k|, in raster order, is in the head's sequence of offsets.

    Head i = 1..H starts at the Wythoff pair ``a = floor(floor(i phi) phi)``, ``b = floor(floor(i
    phi) phi^2)`` and goes on a, b, a + b, ... up to its window ``w_i = w_min + floor((w_max -
    w_min) (i - 1) / (H - 1))`` (sections 3.2 and 3.3 of the paper). Prefix tokens see all and are
    seen by all; without them every patch also sees itself, which the sequences do not contain.

    w_min, w_max: windows of the first and the last head, in tokens; w_max None for a third of the
    patches. modified: also the two terms before a and b, which may be 0. shuffle: give the heads
    of every layer another order, drawn by the layer's index. Inside windows, offsets are those of
    one window; they wrap across rows of the image by design. Raises `InvalidOption` for w_max <
    w_min. The mask is ``[1, H, N, N]``, since rows at the border have fewer keys.

    >>> offsets(heads=6, patches=196)[:2]
    ((1, 2, 3, 5), (4, 7, 11))
    >>> Fibottention(modified=True).to_dict()["options"]["w_min"]
    5
    """

    name = "fibottention"
    paper = "https://arxiv.org/abs/2406.19391"
    fidelity = (
        "as published: offsets exact, other pairs masked out as in the paper (its first code sets "
        "their logits to zero); the order of heads is drawn by another generator"
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
        check_count("w_min", self.w_min, 1)
        if self.w_max is not None:
            check_count("w_max", self.w_max, 1)
            if self.w_max < self.w_min:
                raise InvalidOption(
                    f"w_max must be None or at least w_min = {self.w_min}, got {self.w_max}"
                )
        check_flag("modified", self.modified)
        check_flag("shuffle", self.shuffle)

    def planner(self, site: Site) -> Planner:
        order = torch.arange(site.heads)
        if self.shuffle:
            order = torch.randperm(site.heads, generator=torch.Generator().manual_seed(site.index))
        return FibonacciPlanner(self, tuple(order.tolist()))


@dataclass(frozen=True)
class FibonacciPlanner:
    """One site. order: which sequence each head has."""

    strategy: Fibottention
    order: tuple[int, ...]

    def __call__(self, inputs: AttentionInputs, /) -> Pattern:
        grid, own = inputs.image_grid, self.strategy
        n = grid[0] * grid[1]
        lists = offsets(len(self.order), n, own.w_min, own.w_max, own.modified)
        if not (inputs.prefix and own.prefix_keys):
            lists = tuple((0, *found) for found in lists)
        return laid(inputs.table(banded, tuple(lists[i] for i in self.order), n), inputs)


def offsets(
    heads: int, patches: int, w_min: int = 5, w_max: int | None = None, modified: bool = False
) -> tuple[Offsets, ...]:
    """The offsets of every head, in order and each once; head 1 first.

    A head whose sequence starts beyond its window keeps offset 1.
    """
    last = patches // 3 if w_max is None else w_max
    found = []
    for i in range(1, heads + 1):
        share = (i - 1) / (heads - 1) if heads > 1 else 1.0
        limit = min(w_min + int((last - w_min) * share), patches - 1)
        found.append(_sequence(*wythoff(i), limit, modified) or (1,))
    return tuple(found)


def wythoff(i: int) -> tuple[int, int]:
    """The start of row i of the Wythoff array.

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
    """Pairs of n tokens that are one of a head's offsets apart, ``[H, n, n]``."""
    at = torch.arange(1 - n, n, device=device).abs()
    known = torch.zeros(len(lists), 2 * n - 1, dtype=torch.bool, device=device)
    for head, found in enumerate(lists):
        for offset in found:
            known[head] |= at == offset
    # row j holds the offsets k - j for k = 0 to n - 1: a run of n that starts at place n - 1 - j
    return known.unfold(-1, n, 1).flip(-2)
