"""The down- and up-projections of `connectivity`, as tables over the token grid."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsiattn.attention import geometry
from sparsiattn.attention.geometry import Grid


def initial_tables(
    grid: Grid, prefix: int, cells: Grid, basis: int | None
) -> tuple[Tensor, Tensor]:
    """Average pooling and bilinear interpolation, ``[P + n, K]``; prefix rows are zero."""
    cells = min(cells[0], grid[0]), min(cells[1], grid[1])
    cpu = torch.device("cpu")
    tables = []
    for build in (geometry.pooling, geometry.interpolation):
        table = build(grid, cells, device=cpu)
        if basis is not None:
            table = F.pad(table, (0, max(0, basis - table.shape[1])))[:, :basis]
        tables.append(F.pad(table, (0, 0, prefix, 0)).contiguous())
    return tables[0], tables[1]


def resize_table(table: Tensor, old: Grid, new: Grid, prefix: int) -> Tensor:
    """Bilinear interpolation of the patch rows of ``[P + n, K]`` to another grid; prefix rows
    stay as they are."""
    image = table[prefix:].mT.reshape(1, -1, *old)
    resized = F.interpolate(image.float(), new, mode="bilinear", align_corners=False)
    return torch.cat([table[:prefix], resized[0].flatten(1).mT.to(table.dtype)])


def channel_maps(
    width: int, channels: int, generator: torch.Generator
) -> tuple[nn.Linear, nn.Linear]:
    """Frozen maps of queries and of keys from ``width`` to ``channels``, alike, semi-orthogonal and
    scaled so that products keep their size."""
    weight = torch.empty(channels, width)
    nn.init.orthogonal_(weight, generator=generator)
    gain = max(1.0, math.sqrt(width / channels))
    made = []
    for _ in range(2):
        linear = nn.utils.skip_init(nn.Linear, width, channels)
        linear.weight = nn.Parameter(weight * math.sqrt(gain), requires_grad=False)
        linear.bias = nn.Parameter(torch.zeros(channels), requires_grad=False)
        made.append(linear)
    return made[0], made[1]
