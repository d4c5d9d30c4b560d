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

    k: Budgets = 0.25
    background: int | str | None = field(default=2, kw_only=True)

    def plan(self, inputs: AttentionInputs) -> Pattern:
        if inputs.reduced is None:
            grids = inputs.query_grid, inputs.key_grid
            scores = inputs.table(nearness, *grids, inputs.prefix, inputs.tile, inputs.site.halo)
        else:
            scores = _nearness_of_remaining(inputs, inputs.reduced.grid)
        return Pattern.top(scores, self.k)  # type: ignore[arg-type]


def nearness(
    queries: Grid, keys: Grid, prefix: int, tile: Tile, halo: int, *, device: torch.device
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
        device: Device of the result.
    """
    size = torch.tensor(keys, device=device, dtype=torch.float)
    q = geometry.positions(queries, device=device) * (size - 2 * halo) + halo
    k = geometry.positions(keys, device=device) * size
    if not isinstance(tile, int):
        q = geometry.tiles(queries, tile, device=device).mean(q)
    score = -(q[:, None] - k[None]).square().sum(-1)
    last = score.new_full((score.shape[0], prefix), float(-(keys[0] ** 2 + keys[1] ** 2 + 1)))
    return torch.cat([last, score], dim=-1)[None, None]


def _nearness_of_remaining(inputs: AttentionInputs, grid: Grid) -> Tensor:
    """`nearness` for the tokens that remain of a grid, ``[B, 1, R, P + n]``."""
    size = torch.tensor(grid, device=inputs.k.device, dtype=torch.float)
    positions = inputs.table(geometry.positions, grid) * size
    # prefix tokens have no position; their rows are padded with zeros
    patches = inputs.gather_rows(F.pad(positions, (0, 0, inputs.prefix, 0)))[:, inputs.prefix :]
    rows = patches if inputs.tiles is None else inputs.tiles.mean(patches)
    score = -(rows[:, :, None] - patches[:, None]).square().sum(-1)
    last = score.amin((1, 2), keepdim=True).expand(-1, score.shape[1], inputs.prefix) - 1
    return torch.cat([last, score], dim=-1).unsqueeze(1)
