"""A 2-D window of nearest patches, as in neighbourhood attention."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsiattn import geometry
from sparsiattn.geometry import Grid
from sparsiattn.patterns import Pattern
from sparsiattn.site import AttentionInputs
from sparsiattn.strategy import Budgets, Strategy


@dataclass(frozen=True)
class Local(Strategy):
    """The nearest patches of the image grid (a window that stays full at the border).

    Distances are Euclidean between patch centres; where keys are pooled, queries and keys are laid
    over the same image. In tile mode, nearest to the tile as a whole.
    """

    name = "local"

    k: Budgets = 0.25
    background: int | None = 2

    def plan(self, inputs: AttentionInputs) -> Pattern:
        scores = geometry.table(
            nearness, inputs.query_grid, inputs.keys_grid, inputs.prefix, device=inputs.k.device
        )
        return Pattern.top(scores, self.k)  # type: ignore[arg-type]


def nearness(queries: Grid, keys: Grid, prefix: int, *, device: torch.device) -> Tensor:
    """Minus the squared distance in units of key patches, ``[1, 1, n, prefix + m]``; prefix keys
    come after every patch (the core keeps them where asked to)."""
    size = torch.tensor(keys, device=device, dtype=torch.float)
    q, k = (geometry.positions(grid, device=device) * size for grid in (queries, keys))
    score = -(q[:, None] - k[None]).square().sum(-1)
    last = score.new_full((score.shape[0], prefix), float(-(keys[0] ** 2 + keys[1] ** 2 + 1)))
    return torch.cat([last, score], dim=-1)[None, None]
