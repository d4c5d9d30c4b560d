"""Random keys: the baseline that any choice has to beat."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsiattn.attention import geometry
from sparsiattn.attention.inputs import AttentionInputs
from sparsiattn.attention.pattern import Pattern
from sparsiattn.attention.site import Site
from sparsiattn.strategies.base import Budgets, Strategy


@dataclass(frozen=True)
class Random(Strategy):
    """Keys drawn at random per query (or tile) and head, the same for every image.

    seed: of a private, counter-based generator, with the site's name and its number of keys: it
    touches no global state and draws the same keys on every device.
    """

    name = "random"
    paper = "https://arxiv.org/abs/2007.14062"
    fidelity = "inspired by BigBird's random keys; a control, one mask for all images"

    k: Budgets = 0.25
    seed: int = 0

    def planner(self, site: Site) -> RandomPlanner:
        return RandomPlanner(self, zlib.crc32(f"{self.seed}/{site.name}".encode()))


@dataclass(frozen=True)
class RandomPlanner:
    """Draws for one site; ``key`` stands for the site's name and the seed."""

    strategy: Random
    key: int

    def __call__(self, inputs: AttentionInputs, /) -> Pattern:
        tiles = inputs.tiles
        rows = inputs.n_queries - inputs.prefix if tiles is None else tiles.count
        shape = (inputs.site.heads, rows, inputs.n_keys)
        key = (self.key + inputs.n_keys) * 0x9E3779B1 & 0xFFFFFFFF
        scores = geometry.table(hashed, key, *shape, device=inputs.k.device)
        return Pattern.top(scores, self.strategy.k)  # type: ignore[arg-type]


def hashed(key: int, heads: int, rows: int, columns: int, *, device: torch.device) -> Tensor:
    """Uniform numbers ``[1, heads, rows, columns]`` by a counter hash."""
    counter = torch.arange(heads * rows * columns, device=device)
    return ((hash_integers(counter + key) >> 8).float() / 2**24).view(1, heads, rows, columns)


def hash_integers(x: Tensor) -> Tensor:
    """Uniform integers below 2^32 from distinct ones, by Murmur3's finaliser.

    A draw by hashing a counter is the same on every device and touches no global random state.

    Args:
        x: Integers (int64) of any shape.

    Returns:
        Integers of that shape.

    >>> hash_integers(torch.arange(1, 3)).tolist()
    [1364076727, 821347078]
    """
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
    return x
