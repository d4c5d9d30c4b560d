"""BigBird: a window around every patch, random keys, and tokens that see all.

Big Bird: Transformers for Longer Sequences, arXiv 2007.14062.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsiattn import AttentionInputs, Pattern, Planner, Site, Strategy, hash_integers
from sparsiattn.methods._grid import local_and_global, patch_pattern
from sparsiattn.methods._options import check_count, check_odd


@dataclass(frozen=True)
class BigBird(Strategy):
    """Window, random and global keys (section 2 of the paper), on the 2-D grid of patches.

    A patch sees those at most ``window // 2`` steps away in both directions, and in every head
    ``random`` more patches, distinct, drawn among all of them (so that some may lie in the window).
    Prefix tokens are global: they see all, and all see them.

    Args:
        window: Side of the window in patches, odd.
        random: Keys drawn per patch and head; as many as patches reach every key.
        seed: Of the draw, together with the site's name; a counter hash, the same on every device,
            that touches no global state.
        global_patches: g for g x g patches, spread evenly, that are global too, for hosts without
            CLS.

    Raises:
        InvalidOption: For an even window.

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
    needs_grid = True

    window: int = 3
    random: int = 3
    seed: int = 0
    global_patches: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_odd("window", self.window)
        for name in ("random", "seed", "global_patches"):
            check_count(name, getattr(self, name), 0)

    def planner(self, site: Site) -> Planner:
        key = zlib.crc32(f"{self.seed}/{site.name}".encode())
        return BigBirdPlanner(self, key, site.heads)


@dataclass(frozen=True)
class BigBirdPlanner:
    """Plans for one site.

    Attributes:
        strategy: The options.
        key: Stands for the site's name and the seed.
        heads: Heads of the site.
    """

    strategy: BigBird
    key: int
    heads: int

    def __call__(self, inputs: AttentionInputs, /) -> Pattern:
        grid, options = inputs.image_grid, self.strategy
        mask = inputs.table(local_and_global, grid, options.window, 1, options.global_patches)
        if not options.random:
            return patch_pattern(mask, inputs)
        n = grid[0] * grid[1]
        # lists are kept, H x n x r, and not what they make: H x n x n for every site
        keys = inputs.table(draw, self.key, self.heads, n, min(options.random, n))
        return patch_pattern(mask.expand(self.heads, -1, -1).scatter(-1, keys, True), inputs)


def draw(key: int, heads: int, n: int, count: int, *, device: torch.device) -> Tensor:
    """Distinct keys for each of n queries, all sets of them equally likely.

    Floyd's sampling needs no table of H x n x n numbers.

    Args:
        key: Seed of the draw.
        heads: Heads, each with keys of its own.
        n: Patches to draw from.
        count: Keys of each query.
        device: Where to draw; the keys are the same everywhere.

    Returns:
        ``[H, n, count]``.
    """
    counter = torch.arange(heads * n, device=device)
    drawn: list[Tensor] = []
    for step, last in enumerate(range(n - count, n)):
        start = (key + step * heads * n) * 0x9E3779B1 & 0xFFFFFFFF
        candidate = hash_integers((counter + start) & 0xFFFFFFFF) % (last + 1)
        taken = torch.zeros_like(candidate, dtype=torch.bool)
        for earlier in drawn:
            taken = taken | (earlier == candidate)
        drawn.append(torch.where(taken, last, candidate))
    return torch.stack(drawn, -1).view(heads, n, count)
