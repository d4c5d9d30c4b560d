"""BigBird: a window around every patch, random keys, and global tokens.

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

    A patch attends to patches at most ``window // 2`` steps away in both directions and, in every
    head, to ``random`` distinct patches drawn from all patches (so that some may be in the window).
    Prefix tokens are global: they attend to all tokens, and all tokens attend to them.

    Args:
        window: Side of the window in patches, odd.
        random: Number of random keys per patch and head; the number of patches reaches every key.
        seed: Seed of the random keys, together with the site's name. They come from a counter hash,
            equal on every device, without global state.
        global_patches: g for g x g evenly spaced patches that are global too, for models without a
            class token.

    Raises:
        InvalidOption: The window is even.

    >>> BigBird(random=2).to_dict()["options"]["window"]
    3
    """

    name = "bigbird"
    paper = "https://arxiv.org/abs/2007.14062"
    fidelity = (
        "inspired by: single keys instead of blocks of 64 tokens, a square window on the image, "
        "and another random generator"
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
        strategy: The strategy with its options.
        key: Hash of the seed and the site's name.
        heads: Number of heads of the site.
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
        # the table caches lists, H x n x r, and not the mask, H x n x n, of every site
        keys = inputs.table(draw, self.key, self.heads, n, min(options.random, n))
        return patch_pattern(mask.expand(self.heads, -1, -1).scatter(-1, keys, True), inputs)


def draw(key: int, heads: int, n: int, count: int, *, device: torch.device) -> Tensor:
    """Draw distinct keys for each of n queries, with equal probability for all sets of keys.

    Floyd's sampling needs no table of H x n x n numbers.

    Args:
        key: Seed.
        heads: Number of heads, each with its own keys.
        n: Number of patches to draw from.
        count: Number of keys of each query.
        device: Device of the result; the keys are the same on every device.

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
