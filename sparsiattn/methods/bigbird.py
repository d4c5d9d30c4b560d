"""BigBird: a window around every patch, random keys, and tokens that see all."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsiattn import AttentionInputs, Pattern, Planner, Site, Strategy
from sparsiattn.methods._fixed import check_count, check_odd, laid, local_and_global


@dataclass(frozen=True)
class BigBird(Strategy):
    """Window, random and global keys (section 2 of the paper), on the 2-D grid of patches.

    A patch sees those at most ``window // 2`` steps away in both directions, and in every head
    ``random`` more patches, distinct, drawn among all of them (so that some may lie in the window).
    Prefix tokens are global: they see all, and all see them.

    window: side of the window in patches, odd. random: keys drawn per patch and head. seed: of the
    draw, together with the site's name; a counter hash, the same on every device, that touches no
    global state. global_patches: g for g x g patches, spread evenly, that are global too, for hosts
    without CLS. Raises `InvalidOption` for an even window. As many random keys as patches reach
    every key.

    >>> BigBird(random=2).to_dict()["options"]["window"]
    3
    """

    name = "bigbird"
    paper = "https://arxiv.org/abs/2007.14062"
    fidelity = (
        "inspired by: single keys instead of blocks of 64 tokens, the window is square on the "
        "image, and the draw is another one"
    )
    needs_training = True

    window: int = 3
    random: int = 3
    seed: int = 0
    global_patches: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_odd("window", self.window)
        check_count("random", self.random, 0)
        check_count("seed", self.seed, 0)
        check_count("global_patches", self.global_patches, 0)

    def planner(self, site: Site) -> Planner:
        key = zlib.crc32(f"{self.seed}/{site.name}".encode())
        return BigBirdPlanner(self, key, site.heads)


@dataclass(frozen=True)
class BigBirdPlanner:
    """One site. key: stands for its name and the seed."""

    strategy: BigBird
    key: int
    heads: int

    def __call__(self, inputs: AttentionInputs, /) -> Pattern:
        grid, own = inputs.image_grid, self.strategy
        keep = inputs.table(local_and_global, grid, own.window, 1, own.global_patches)
        if not own.random:
            return laid(keep, inputs)
        n = grid[0] * grid[1]
        # lists are kept, H x n x r, and not what they make: H x n x n for every site
        drawn = inputs.table(draw, self.key, self.heads, n, min(own.random, n))
        return laid(keep.expand(self.heads, -1, -1).scatter(-1, drawn, True), inputs)


def draw(key: int, heads: int, n: int, count: int, *, device: torch.device) -> Tensor:
    """``count`` distinct keys of n for each of n queries, ``[H, n, count]``, all sets equally
    likely (Floyd's sampling): no table of H x n x n numbers is needed."""
    found: list[Tensor] = []
    for step, last in enumerate(range(n - count, n)):
        one = hashed(key + step * heads * n, heads * n, device=device) % (last + 1)
        taken = torch.zeros_like(one, dtype=torch.bool)
        for other in found:
            taken = taken | (other == one)
        found.append(torch.where(taken, last, one))
    return torch.stack(found, -1).view(heads, n, count)


def hashed(key: int, count: int, *, device: torch.device) -> Tensor:
    """Uniform integers below 2^32, ``[count]``, by a counter hash (Murmur3's finaliser)."""
    start = key * 0x9E3779B1 & 0xFFFFFFFF
    x = (torch.arange(count, device=device) + start) & 0xFFFFFFFF
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
    return x
