"""A 2-D window of nearest patches, as in neighbourhood attention."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsiattn.attention import geometry
from sparsiattn.attention.geometry import Grid, Tile
from sparsiattn.attention.inputs import AttentionInputs
from sparsiattn.attention.pattern import Pattern
from sparsiattn.strategies.base import Budgets, Strategy


@dataclass(frozen=True)
class Local(Strategy):
    """The nearest patches in the image grid (at the border, windows keep their full size).

    Distances are Euclidean, between patch centres; if keys are pooled, their grid covers the same
    image as that of the queries. With tiles, the keys nearest to the tile's centre are kept.

    Args:
        k: Share or count of the keys, one for all sites, a list, or a function of the `Site`.
        background: As in `Strategy`.
    """

    name = "local"
    paper = "https://arxiv.org/abs/2204.07143"
    fidelity = "inspired by neighbourhood attention: the k nearest keys on the grid, any share"

    needs_grid = True
    supports_views = True

    k: Budgets = 0.25
    background: int | str | None = field(default=2, kw_only=True)

    def plan(self, inputs: AttentionInputs) -> Pattern:
        if inputs.reduced is None:
            grids = inputs.query_grid, inputs.key_grid
            views = inputs.views if inputs.views == inputs.key_views else 1
            options = inputs.prefix, inputs.tile, inputs.site.halo, views
            scores = inputs.table(nearness, *grids, *options)
        else:
            scores = _nearness_of_remaining(inputs, inputs.reduced.grid)
        return Pattern.top(scores, self.k)  # type: ignore[arg-type]


def nearness(
    queries: Grid,
    keys: Grid,
    prefix: int,
    tile: Tile,
    halo: int,
    views: int = 1,
    *,
    device: torch.device,
) -> Tensor:
    """Minus the squared distance in units of key patches, ``[1, 1, R, prefix + m]``.

    Distances are from every patch query, or from the centre of every tile. (The mean squared
    distance from a tile's queries differs by a constant, so it would rank keys in the same way.)
    Prefix keys get the lowest score; the core keeps them if the user wants it.

    Args:
        queries: Grid of the patch queries.
        keys: Grid of the patch keys, over the same image.
        prefix: Number of prefix keys.
        tile: As in `AttentionInputs`.
        halo: Number of key patches by which keys extend beyond the queries on every side.
        views: Number of images or frames in the grids; they are one patch apart.
        device: Device of the result.
    """
    sides = (keys[0] // views, keys[1], views)
    size = torch.tensor(sides, device=device, dtype=torch.float)
    inner = torch.tensor([halo, halo, 0.0], device=device)
    q = places(queries, views, device=device) * (size - 2 * inner) + inner
    k = places(keys, views, device=device) * size
    if not isinstance(tile, int):
        q = geometry.tiles(queries, tile, views, device=device).mean(q)
    score = -(q[:, None] - k[None]).square().sum(-1)
    last = score.new_full((score.shape[0], prefix), -float(sum(side**2 for side in sides) + 1))
    return torch.cat([last, score], dim=-1)[None, None]


def places(grid: Grid, views: int, *, device: torch.device) -> Tensor:
    """Row, column and view of every token in unit coordinates, ``[n, 3]``, all in (0, 1).

    >>> places((4, 1), 2, device=torch.device("cpu")).tolist()[2]
    [0.25, 0.5, 0.75]
    """
    in_view = geometry.positions((grid[0] // views, grid[1]), device=device)
    view = (torch.arange(views, device=device) + 0.5) / views
    return torch.cat([in_view.repeat(views, 1), view.repeat_interleave(len(in_view))[:, None]], 1)


def _nearness_of_remaining(inputs: AttentionInputs, grid: Grid) -> Tensor:
    """`nearness` for the tokens that remain of a grid, ``[B, 1, R, P + n]``."""
    views = inputs.site.views if grid[0] % inputs.site.views == 0 else 1
    sides = [grid[0] // views, grid[1], views]
    size = torch.tensor(sides, device=inputs.k.device, dtype=torch.float)
    positions = inputs.table(places, grid, views) * size
    # prefix tokens have no position; their rows are padded with zeros
    patches = inputs.gather_rows(F.pad(positions, (0, 0, inputs.prefix, 0)))[:, inputs.prefix :]
    rows = patches if inputs.tiles is None else inputs.tiles.mean(patches)
    score = -(rows[:, :, None] - patches[:, None]).square().sum(-1)
    last = score.amin((1, 2), keepdim=True).expand(-1, score.shape[1], inputs.prefix) - 1
    return torch.cat([last, score], dim=-1).unsqueeze(1)
