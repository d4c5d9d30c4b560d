"""Static masks and tables over the grid of patches."""

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
        build: Module-level function that makes a boolean ``[H|1, n, n]`` from a grid and
            ``options``.
        options: Other arguments of ``build``.
    """

    build: Callable[..., Tensor]
    options: tuple[Hashable, ...]

    def __call__(self, inputs: AttentionInputs, /) -> Pattern:
        return patch_pattern(inputs.table(self.build, inputs.image_grid, *self.options), inputs)


def patch_pattern(mask: Tensor, inputs: AttentionInputs) -> Pattern:
    """The pattern of a boolean ``[H|1, n, n]`` among the patches of `AttentionInputs.image_grid`.

    If queries have another grid than keys, or tokens were dropped or merged, each token uses the
    row of the nearest patch. The core adds rows and columns of prefix tokens.
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
    """The patch nearest to each remaining token, ``[B, n]``."""
    (rows, columns), prefix = inputs.image_grid, inputs.prefix
    patch = torch.arange(rows * columns, device=inputs.k.device)
    places = torch.stack([patch // columns, patch % columns], -1).float()
    # gather_rows expects rows for the prefix tokens
    place = inputs.gather_rows(F.pad(places, (0, 0, prefix, 0)))[:, prefix:].round().long()
    return place[..., 0] * columns + place[..., 1]


def _patch_under(queries: Grid, keys: Grid, halo: int, *, device: torch.device) -> Tensor:
    """The key patch at the centre of every query, ``[n]``.

    Queries cover the keys except for a margin of ``halo`` key patches on every side.
    """
    row, column = (
        ((torch.arange(size, device=device) + 0.5) * (keys_along - 2 * halo) / size + halo)
        .long()
        .clamp(0, keys_along - 1)
        for keys_along, size in zip(keys, queries, strict=True)
    )
    return (row[:, None] * keys[1] + column).flatten()


def grid_pairs(rows: Tensor, columns: Tensor) -> Tensor:
    """Pairs of patches whose rows and columns are both allowed.

    This is much cheaper than comparing the positions of all pairs.

    Args:
        rows: ``[R, R']``, allowed pairs of rows.
        columns: ``[C, C']``, allowed pairs of columns.

    Returns:
        ``[R C, R' C']``.
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
    """The middle index of each of ``parts`` nearly equal parts of ``size``, ``[parts]``."""
    return (2 * torch.arange(parts, device=device) + 1) * size // max(1, 2 * parts)


def global_patches(grid: Grid, side: int, *, device: torch.device) -> Tensor:
    """Boolean mask of global patches, ``[n]``: the centres of side x side equal cells.

    There are fewer if the grid has fewer rows or columns.
    """
    row, column = (
        (torch.arange(n, device=device)[:, None] == middles(n, min(side, n), device=device)).any(-1)
        for n in grid
    )
    return (row[:, None] & column).flatten()


def local_and_global(
    grid: Grid, side: int, dilation: int, global_side: int, *, device: torch.device
) -> Tensor:
    """Pairs in a window, and pairs with a global patch, ``[1, n, n]``."""
    is_global = global_patches(grid, global_side, device=device)
    mask = window_pairs(grid, side, dilation, device=device) | is_global | is_global[:, None]
    return mask.unsqueeze(0)


def resized(table: Tensor, old: Grid, new: Grid, prefix: int) -> Tensor:
    """Resize the patch rows of ``[P + n, K]`` to another grid; prefix rows are unchanged."""
    if old == new:
        return table
    image = table[prefix:].mT.reshape(1, -1, *old).float()
    rows = F.interpolate(image, new, mode="bilinear", align_corners=False)[0].flatten(1).mT
    return torch.cat([table[:prefix], rows.to(table.dtype)])
