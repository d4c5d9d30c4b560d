"""What several methods share: tables over a token grid, and losses of planners that compute."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsiattn import AttentionInputs, InvalidOption, Pattern, Site

Grid = tuple[int, int]


def count(k: float, n: int) -> int:
    """``ceil(k * n)`` for a share, at most ``n`` for a count."""
    return min(k, n) if isinstance(k, int) else max(1, min(n, math.ceil(k * n)))


def cells_of(grid: Grid, most: int) -> Grid:
    """The largest grid of at most ``most`` cells of about the same shape as ``grid``."""
    shares = [(rows, min(grid[1], most // rows)) for rows in range(1, min(grid[0], most) + 1)]
    aspect = grid[0] / grid[1]
    return max(shares, key=lambda c: (c[0] * c[1]) - abs(math.log(c[0] / c[1] / aspect)) * most / 4)


def members(grid: Grid, cells: Grid) -> Tensor:
    """Which cell each token lies in when the grid is cut into near-equal rectangles, ``[n, c]``
    with a one in every row."""
    sides = [torch.arange(size) * parts // size for size, parts in zip(grid, cells, strict=True)]
    ids = (sides[0][:, None] * cells[1] + sides[1]).flatten()
    return F.one_hot(ids, cells[0] * cells[1]).float()


def resized(table: Tensor, old: Grid, new: Grid, prefix: int) -> Tensor:
    """The patch rows of ``[P + n, K]`` laid over another grid; prefix rows stay."""
    if old == new:
        return table
    image = table[prefix:].mT.reshape(1, -1, *old).float()
    rows = F.interpolate(image, new, mode="bilinear", align_corners=False)[0].flatten(1).mT
    return torch.cat([table[:prefix], rows.to(table.dtype)])


def for_heads(table: Tensor) -> Tensor:
    """``[B, N, K]`` with an axis for heads, ``[N, K]`` as it is."""
    return table.unsqueeze(1) if table.dim() == 3 else table


def refuse_mask(name: str, site: Site, forbids: bool) -> None:
    """Keys that a host's mask forbids to some queries cannot be mixed with others."""
    if forbids:
        raise InvalidOption(
            f"{name!r} mixes keys, and at site {site.name!r} the host's mask forbids some of them "
            "(shifted windows, padding): leave such sites out with sites="
        )


def host_bias(inputs: AttentionInputs) -> Tensor | None:
    """The host's bias for the patch queries, ``[B|1, H|1, n|1, Nk]``."""
    bias = inputs.bias
    return bias if bias is None or bias.shape[-2] == 1 else bias[..., inputs.prefix :, :]


def join(parts: Sequence[Tensor]) -> Tensor:
    """Side by side along the last axis, other axes expanded."""
    lead = torch.broadcast_shapes(*(part.shape[:-1] for part in parts))
    return torch.cat([part.expand(*lead, -1) for part in parts], dim=-1)


def distance(output: Tensor, exact: Tensor) -> Tensor:
    """Mean squared error relative to the exact output's mean square (a scalar)."""
    exact = exact.detach().float()
    return (output.float() - exact).square().mean() / exact.square().mean().clamp_min(1e-12)


def output_loss(plan: Pattern, inputs: AttentionInputs) -> Tensor:
    """How far attention by a plan that computes its keys is from dense attention."""
    return distance(inputs.attention(plan), inputs.attention())


def layer_indices(name: str, layers: object) -> tuple[int, ...] | None:
    """Site indices as a tuple in order; an error that says what is wrong with them."""
    if layers is None:
        return None
    given = tuple(layers) if isinstance(layers, (tuple, list)) else ()
    if not given or not all(type(layer) is int and layer >= 1 for layer in given):
        raise InvalidOption(
            f"layers of {name!r} must be None or site indices >= 1 (the first site has nothing to "
            f"reuse), got {layers!r}"
        )
    return tuple(sorted(set(given)))


def check_depth(name: str, layers: Sequence[int], site: Site) -> None:
    if layers and layers[-1] >= site.depth:
        raise InvalidOption(
            f"layers of {name!r} name site {layers[-1]}, and the model has {site.depth} "
            f"(0 to {site.depth - 1})"
        )
