"""The strategy `random`: random keys, the baseline that every other choice has to beat."""

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

    They come from hashing a counter, which uses no global state and gives the same keys on every
    device.

    Args:
        k: Share or count of the keys, one for all sites, a list, or a function of the `Site`.
        seed: Seed of the draw, which also depends on the site's name and its number of keys.
    """

    name = "random"
    paper = "https://arxiv.org/abs/2007.14062"
    fidelity = "inspired by BigBird's random keys; a control, one mask for all images"

    supports_frames = True

    k: Budgets = 0.25
    seed: int = 0

    def planner(self, site: Site) -> RandomPlanner:
        return RandomPlanner(self, site_key(self.seed, site))


@dataclass(frozen=True)
class RandomPlanner:
    """The planner of `Random` for one site.

    Attributes:
        strategy: The strategy, which has the budget.
        key: The result of `site_key`.
    """

    strategy: Random
    key: int

    def __call__(self, inputs: AttentionInputs, /) -> Pattern:
        tiles = inputs.tiles
        rows = inputs.n_queries - inputs.prefix if tiles is None else tiles.count
        scores = draw(self.key, inputs.site.heads, rows, inputs.n_keys, inputs.k.device)
        return Pattern.top(scores, self.strategy.k)  # type: ignore[arg-type]


def site_key(seed: int, site: Site) -> int:
    """A hash of the seed and the site's name."""
    return zlib.crc32(f"{seed}/{site.name}".encode())


def draw(key: int, heads: int, rows: int, columns: int, device: torch.device) -> Tensor:
    """Uniform random numbers ``[1, heads, rows, columns]``, cached for later calls.

    They differ between keys and between numbers of columns.
    """
    counter = (key + columns) * 0x9E3779B1 & 0xFFFFFFFF  # spreads keys that are close together
    return geometry.table(_hashed, counter, heads, rows, columns, device=device)


def _hashed(key: int, heads: int, rows: int, columns: int, *, device: torch.device) -> Tensor:
    """Uniform random numbers ``[1, heads, rows, columns]``, by hashing a counter."""
    counter = torch.arange(heads * rows * columns, device=device)
    return ((hash_integers(counter + key) >> 8).float() / 2**24).view(1, heads, rows, columns)


def hash_integers(x: Tensor) -> Tensor:
    """Hash distinct integers to uniform integers below 2^32, by Murmur3's finaliser.

    Random numbers from a hashed counter are the same on every device and use no global state.

    Args:
        x: Integers (int64) of any shape.

    Returns:
        Integers of the same shape.

    >>> hash_integers(torch.arange(1, 3)).tolist()
    [1364076727, 821347078]
    """
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
    return x
