"""What the tests know of hosts, and how a patched one is compared with attention by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import sparsiattn
from tests.support import by_hand
from tests.support.by_hand import ByHand, Kept, Places
from tests.support.census import flat

Grid = tuple[int, int]


def centres(grid: Grid) -> Tensor:
    """Row and column of every patch's centre, in raster order."""
    return torch.cartesian_prod(*(torch.arange(side) + 0.5 for side in grid))


def unrolled(grid: Grid) -> Tensor:
    """The same in Hiera's order: by the place in squares of two by two patches, then by that of the
    square in the next larger one, and so on."""
    levels = int(math.log2(grid[0]))
    places = torch.cartesian_prod(*2 * levels * [torch.arange(2)]).view(-1, levels, 2)
    return (places * 2 ** torch.arange(levels)[:, None]).sum(1) + 0.5


@dataclass(frozen=True)
class Host:
    """What the test knows of a model.

    Args:
        grids: Of patches, in its blocks or windows; a call's are those with as many patches as it
            has queries and keys.
        prefix: Tokens before them.
        suffix: Tokens after them.
        prefixed: Part of the names of sites that have the prefix.
        image: Rows and columns of the image.
        images: How many are computed at once.
        patched: Of the one given to `patch`, where it is another.
        halo: Key patches beyond the queries' on every side.
        order: Row and column of every patch of a grid, in the order of the tokens.
        shared: Whether two calls of a site use the keys of the first.
        make: The model, where the zoo lacks it.
    """

    grids: tuple[Grid, ...]
    prefix: int = 0
    suffix: int = 0
    prefixed: str = ""
    image: Grid | None = None
    images: int = 2
    patched: Grid | None = None
    halo: int = 0
    order: Callable[[Grid], Tensor] = centres
    shared: bool = False
    make: Callable[[], nn.Module] | None = None

    def places(self, site: str, queries: int, keys: int) -> Places:
        prefix = self.prefix if self.prefixed in site else 0
        rows, columns = (self.grid(n - prefix - self.suffix) for n in (queries, keys))
        inner = torch.tensor([side - 2 * self.halo * (rows != columns) for side in columns])
        start = (torch.tensor(columns) - inner) / 2
        q = self.order(rows) / torch.tensor(rows) * inner + start
        return Places(prefix, q, self.order(columns), columns, self.suffix)

    def grid(self, patches: int) -> Grid:
        fitting = [g for g in self.grids if g[0] * g[1] == patches]
        assert len(fitting) == 1, f"{patches} patches are no grid of {self.grids}"
        return fitting[0]


RULES = {
    "topk": (by_hand.largest, {}),
    "local": (by_hand.nearest, {"background": None}),
    "connectivity": (
        by_hand.connected,
        {"background": None, "tokens_per_basis": 4, "mean_query_boost": False, "self_weight": None},
    ),
}


K = 0.25


def disagreements(
    model: nn.Module, run: Callable[[], Any], host: Host, strategy: str, given: Any
) -> list[str]:
    """What a patched model does otherwise than attention by hand. given: the input for `patch`."""
    rule, options = RULES[strategy]
    patch = partial(sparsiattn.patch, model, strategy, k=K, tile=1, input=given, **options)
    kept = Kept()
    with patch():
        out = flat(run())
    with kept.watching(model), patch(kernel="sdpa") as live:
        kept.sites = [site.name for site in live.sites]
        masked = flat(run())
    oracle = ByHand(kept, rule, host.places, K, host.shared)
    with by_hand.running(model, oracle):
        expected = flat(run())
    for name, found in (("sdpa", masked), ("auto", out)):
        if not torch.allclose(found, expected, rtol=1e-3, atol=1e-4):
            oracle.wrong.append(f"kernel {name}: off by {(found - expected).abs().max():.1e}")
    return oracle.wrong
