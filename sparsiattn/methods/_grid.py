"""Masks that are the same for every image, and tables over the grid of patches."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsiattn import AttentionInputs, Pattern

Grid = tuple[int, int]


@dataclass(frozen=True)
class GridPlanner:
    """Plans the same mask among patches for every image.

    Attributes:
        build: Makes a boolean ``[H|1, n, n]`` from a grid and ``options``; a function of a module.
        options: Its other arguments.
    """

    build: Callable[..., Tensor]
    options: tuple[Hashable, ...]

    def __call__(self, inputs: AttentionInputs, /) -> Pattern:
        return patch_pattern(inputs.table(self.build, inputs.image_grid, *self.options), inputs)


def patch_pattern(mask: Tensor, inputs: AttentionInputs) -> Pattern:
    """The pattern of a boolean ``[H|1, n, n]`` among the patches of `AttentionInputs.image_grid`.

    Where queries lie on another grid than keys, or tokens were dropped or merged, each one stands
    for the patch that it is nearest to. The core adds rows and columns of prefix tokens.
    """
    token_state, prefix = inputs.token_state, inputs.prefix
    if token_state is not None and token_state.reduced:
        patch = _remaining_patches(inputs)
        mask = mask[:, patch[:, :, None], patch[:, None, :]].transpose(0, 1)
    elif inputs.query_grid != inputs.key_grid or inputs.site.halo:
        patch = inputs.table(_patch_under, inputs.query_grid, inputs.key_grid, inputs.site.halo)
        mask = mask.index_select(-2, patch).unsqueeze(0)
    else:
        mask = mask.unsqueeze(0)
    return Pattern.mask(F.pad(mask, (prefix, 0, prefix, 0)) if prefix else mask)


def _remaining_patches(inputs: AttentionInputs) -> Tensor:
    """The patch nearest to each token that is left, ``[B, n]``."""
    (rows, columns), prefix = inputs.image_grid, inputs.prefix
    patch = torch.arange(rows * columns, device=inputs.k.device)
    places = torch.stack([patch // columns, patch % columns], -1).float()
    # rows of prefix tokens are there only because gather_rows expects them
    place = inputs.gather_rows(F.pad(places, (0, 0, prefix, 0)))[:, prefix:].round().long()
    return place[..., 0] * columns + place[..., 1]


def _patch_under(queries: Grid, keys: Grid, halo: int, *, device: torch.device) -> Tensor:
    """The key patch under the middle of every query, ``[n]``.

    Queries lie over the keys but for a margin of ``halo`` key patches on every side.
    """
    row, column = (
        ((torch.arange(size, device=device) + 0.5) * (keys_along - 2 * halo) / size + halo)
        .long()
        .clamp(0, keys_along - 1)
        for keys_along, size in zip(keys, queries, strict=True)
    )
    return (row[:, None] * keys[1] + column).flatten()


def grid_pairs(rows: Tensor, columns: Tensor) -> Tensor:
    """Pairs of patches of which ``[R, R']`` allows the rows and ``[C, C']`` the columns.

    Returns:
        ``[R C, R' C']``, much cheaper than to compare the places of all pairs.
    """
    pairs = rows[:, None, :, None] & columns[None, :, None, :]
    return pairs.reshape(len(rows) * len(columns), -1)


def window_pairs(grid: Grid, side: int, dilation: int, *, device: torch.device) -> Tensor:
    """Pairs at most ``side // 2`` steps of ``dilation`` apart in both directions, ``[n, n]``."""
    near = []
    for size in grid:
        index = torch.arange(size, device=device)
        distance = (index[:, None] - index).abs()
        near.append((distance <= side // 2 * dilation) & (distance % dilation == 0))
    return grid_pairs(*near)


def middles(size: int, parts: int, *, device: torch.device) -> Tensor:
    """The index in the middle of each of ``parts`` near-equal parts of ``size``, ``[parts]``."""
    return (2 * torch.arange(parts, device=device) + 1) * size // max(1, 2 * parts)


def global_patches(grid: Grid, side: int, *, device: torch.device) -> Tensor:
    """Which patches are global, ``[n]``: the middles of side x side equal cells, fewer where the
    grid has fewer rows or columns."""
    row, column = (
        (torch.arange(n, device=device)[:, None] == middles(n, min(side, n), device=device)).any(-1)
        for n in grid
    )
    return (row[:, None] & column).flatten()


def local_and_global(
    grid: Grid, side: int, dilation: int, global_side: int, *, device: torch.device
) -> Tensor:
    """A window, and patches that see all and that all see, ``[1, n, n]``."""
    sees_all = global_patches(grid, global_side, device=device)
    mask = window_pairs(grid, side, dilation, device=device) | sees_all | sees_all[:, None]
    return mask.unsqueeze(0)


def resized(table: Tensor, old: Grid, new: Grid, prefix: int) -> Tensor:
    """The patch rows of ``[P + n, K]`` laid over another grid; prefix rows stay."""
    if old == new:
        return table
    image = table[prefix:].mT.reshape(1, -1, *old).float()
    rows = F.interpolate(image, new, mode="bilinear", align_corners=False)[0].flatten(1).mT
    return torch.cat([table[:prefix], rows.to(table.dtype)])
