"""A 2-D window of nearest patches, as in neighbourhood attention."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsiattn.attention import geometry
from sparsiattn.attention.geometry import Grid, Tile
from sparsiattn.attention.inputs import AttentionInputs
from sparsiattn.attention.pattern import Pattern
from sparsiattn.strategies.base import Budgets, Strategy


@dataclass(frozen=True)
class Local(Strategy):
    """The nearest patches of the image grid (a window that stays full at the border).

    Distances are Euclidean between patch centres; where keys are pooled, queries and keys are laid
    over the same image. In tile mode, nearest to the tile as a whole.
    """

    name = "local"
    paper = "https://arxiv.org/abs/2204.07143"
    fidelity = "inspired by neighbourhood attention: the k nearest keys on the grid, any share"

    k: Budgets = 0.25
    background: int | None = 2

    def plan(self, inputs: AttentionInputs) -> Pattern:
        token_state = inputs.token_state
        if token_state is not None and token_state.reduced:
            places = inputs.gather_rows(
                _padded_positions(token_state.grid, inputs.prefix, inputs.k.device)
            )
            return Pattern.top(_between(places, inputs), self.k)  # type: ignore[arg-type]
        scores = geometry.table(
            nearness,
            inputs.query_grid,
            inputs.key_grid,
            inputs.prefix,
            inputs.tile,
            inputs.site.halo,
            device=inputs.k.device,
        )
        return Pattern.top(scores, self.k)  # type: ignore[arg-type]


def nearness(
    queries: Grid, keys: Grid, prefix: int, tile: Tile, margin: int, *, device: torch.device
) -> Tensor:
    """Minus the squared distance in units of key patches, ``[1, 1, R, prefix + m]``, from every
    patch query, or from the middle of every tile: the mean distance from a tile's queries differs
    from that by a constant, so both name the same keys. Queries lie over the keys but for a margin
    of key patches. Prefix keys come after every patch (the core keeps them where asked to)."""
    size = torch.tensor(keys, device=device, dtype=torch.float)
    q = geometry.positions(queries, device=device) * (size - 2 * margin) + margin
    k = geometry.positions(keys, device=device) * size
    if not isinstance(tile, int):
        q = geometry.tiles(queries, tile, device=device).mean(q)
    score = -(q[:, None] - k[None]).square().sum(-1)
    last = score.new_full((score.shape[0], prefix), float(-(keys[0] ** 2 + keys[1] ** 2 + 1)))
    return torch.cat([last, score], dim=-1)[None, None]


def _padded_positions(grid: Grid, prefix: int, device: torch.device) -> Tensor:
    """``[P + n0, 2]``: row and column of every patch; prefix tokens have none."""
    size = torch.tensor(grid, device=device, dtype=torch.float)
    places = geometry.table(geometry.positions, grid, device=device) * size
    return torch.nn.functional.pad(places, (0, 0, prefix, 0))


def _between(places: Tensor, inputs: AttentionInputs) -> Tensor:
    """`nearness` of the tokens that are left, ``[B, 1, R, P + n]``."""
    patches = places[:, inputs.prefix :]
    rows = patches if inputs.tiles is None else inputs.tiles.mean(patches)
    score = -(rows[:, :, None] - patches[:, None]).square().sum(-1)
    last = score.amin((1, 2), keepdim=True).expand(-1, score.shape[1], inputs.prefix) - 1
    return torch.cat([last, score], dim=-1).unsqueeze(1)
