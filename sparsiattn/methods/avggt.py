"""AVGGT: attention over many views, first within each view, later to a grid of keys.

AVGGT: Rethinking Global Attention for Accelerating VGGT, CVPR 2026, arXiv 2512.02541.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from sparsiattn import AttentionInputs, KeyIndex, Pattern, Site, Strategy
from sparsiattn.methods._grid import Grid, patch_pattern
from sparsiattn.methods._options import check_count, check_number

MOST_SCORES = 1 << 24
"""Scores that exist at once while a table is made."""


@dataclass(frozen=True)
class AVGGT(Strategy):
    """The early layers over several views attend within each view, the others to a grid of keys.

    In the other layers a patch attends to every ``stride``-th row and column of patches of each
    view, to the patches of its own tile, to all special tokens, and to one mean key per view that
    stands for the dropped ones (section 4 of the paper: K/V subsampling with diagonal preservation
    and mean fill). Special tokens attend to all keys. Layers within one view stay dense, unless the
    model has no layer over several views: then all layers attend to a grid of keys.

    Args:
        first: Share of the layers over several views that attend within each view, 9 of 24 in the
            paper.
        stride: Rows and columns from one kept patch to the next; 4 in the paper. Views with fewer
            rows or columns keep the middle one.
        background: 1 for the mean key of every view, None for none.

    >>> AVGGT(first=0.5, stride=2).to_dict()["options"]["stride"]
    2
    """

    name = "avggt"
    paper = "https://arxiv.org/abs/2512.02541"
    fidelity = (
        "inspired by: written from the abstract, as there is no code. Patches of a tile share "
        "keys, so each keeps the patches of its tile, not itself alone; a mean key counts as many "
        "times as there are keys that it stands for; special tokens attend to all views"
    )
    exact_at_full = False
    inexact_reason = "there is no budget: first=0 and stride=1 keep all keys"
    needs_grid = True
    supports_views = True
    plans_by_shape = True

    first: float = 0.375
    stride: int = 4
    background: int | str | None = field(default=1, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("first", self.first, 0, 1)
        check_count("stride", self.stride)

    def resolve_sites(self, sites: Sequence[Site]) -> list[Strategy]:
        """Sites within each view get ``first=1``, those with a grid of keys ``first=0``."""
        across = [site for site in sites if site.views > 1] or list(sites)
        within = set(across[: round(self.first * len(across))] if across[0].views > 1 else ())
        resolved: list[Strategy] = []
        for site in sites:
            if site in within:
                resolved.append(replace(self, first=1.0, background=None))
            else:
                stride = self.stride if site in across else 1
                resolved.append(replace(self, first=0.0, stride=stride))
        return resolved

    def keeps_all(self, n_keys: int) -> bool:
        return self.first == 0 and self.stride == 1

    def plan(self, inputs: AttentionInputs) -> Pattern:
        if inputs.reduced is not None or inputs.query_grid != inputs.key_grid:
            views = 1 if inputs.reduced is not None else inputs.key_views
            build, options = (same_view, ()) if self.first else (strided_mask, (self.stride,))
            return patch_pattern(inputs.table(build, inputs.image_grid, views, *options), inputs)
        sizes = inputs.tiles, inputs.key_grid, inputs.key_views, inputs.prefix
        if self.first:
            index = inputs.table(keys_within_views, *sizes, _specials(inputs))
        else:
            index = inputs.table(strided_keys, *sizes, self.stride)
        return KeyIndex.of(inputs, index)


def _specials(inputs: AttentionInputs) -> tuple[int, int, int]:
    """Special tokens before the views, in each view, and after the views."""
    structure = inputs.site.structure
    if structure is None or inputs.key_views == 1:
        return inputs.prefix, 0, 0
    return structure.prefix, len(structure.specials), structure.suffix


def _row_of_patch(tiles: Any, n: int, device: torch.device) -> Tensor:
    """The row of a pattern that has each patch, ``[n]``: its own, or that of its tile."""
    if tiles is None:
        return torch.arange(n, device=device)
    return torch.div(tiles.slot, tiles.size, rounding_mode="floor")


def keys_within_views(
    tiles: Any,
    grid: Grid,
    views: int,
    prefix: int,
    specials: tuple[int, int, int],
    *,
    device: torch.device,
) -> Tensor:
    """The keys of each row's own view, and the special tokens that belong to no view.

    Args:
        tiles: Patches that share a row, or None.
        grid: Rows and columns of patches, the views stacked vertically.
        views: Number of views.
        prefix: Number of special tokens.
        specials: Special tokens before the views, in each view, and after the views.
        device: Device of the lists.

    Returns:
        ``[1, 1, R, K]``.
    """
    n, (before, inside, after) = math.prod(grid) // views, specials
    shared = torch.tensor([*range(before), *range(prefix - after, prefix)], device=device).long()
    view = torch.arange(views, device=device)[:, None]
    own = before + view * inside + torch.arange(inside, device=device)
    patches = prefix + view * n + torch.arange(n, device=device)
    lists = torch.cat([shared.expand(views, -1), own, patches], dim=-1)
    first = torch.arange(views * n, device=device) if tiles is None else tiles.order[:, 0]
    return lists[torch.div(first, n, rounding_mode="floor")][None, None]


def _start(side: int, stride: int) -> int:
    """The first kept row or column of so many."""
    return min(stride, side) // 2


def _kept(side: int, stride: int) -> int:
    """The number of kept rows or columns of so many."""
    return len(range(_start(side, stride), side, stride))


def on_stride(grid: Grid, views: int, stride: int, *, device: torch.device) -> Tensor:
    """Whether a patch is on the grid of kept keys, ``[n]``.

    >>> on_stride((4, 4), 1, 2, device=torch.device("cpu")).nonzero().flatten().tolist()
    [5, 7, 13, 15]
    """
    sides = grid[0] // views, grid[1]
    row, column = (
        torch.arange(side, device=device) % stride == _start(side, stride) for side in sides
    )
    return (row[:, None] & column).flatten().repeat(views)


def strided_keys(
    tiles: Any, grid: Grid, views: int, prefix: int, stride: int, *, device: torch.device
) -> Tensor:
    """All special tokens, the patches on the grid of kept keys, and those of each row itself.

    Rows with fewer patches of their own keep others, so that all lists have the same length.

    Args:
        tiles: Patches that share a row, or None.
        grid: Rows and columns of patches, the views stacked vertically.
        views: Number of views.
        prefix: Number of special tokens.
        stride: As in `AVGGT`.
        device: Device of the lists.

    Returns:
        ``[1, 1, R, K]``.
    """
    n = math.prod(grid)
    rows, size = (n, 1) if tiles is None else (tiles.count, tiles.size)
    # Dynamo cannot trace a generator as an argument of `math.prod`
    kept = views * _kept(grid[0] // views, stride) * _kept(grid[1], stride)
    row_of_patch = _row_of_patch(tiles, n, device)
    is_kept = on_stride(grid, views, stride, device=device)
    step = max(1, MOST_SCORES // n)
    parts = [
        _best(row_of_patch, is_kept, range(start, min(rows, start + step)), min(n, kept + size))
        for start in range(0, rows, step)
    ]
    first = torch.arange(prefix, device=device).expand(rows, -1)
    return torch.cat([first, torch.cat(parts) + prefix], dim=-1)[None, None]


def _best(row_of_patch: Tensor, is_kept: Tensor, rows: range, width: int) -> Tensor:
    """Patches of some rows, ``[rows, width]``: own ones and kept ones, then the first others."""
    ids = torch.arange(rows.start, rows.stop, device=is_kept.device)
    scores = ((row_of_patch == ids[:, None]) | is_kept).double()
    order = torch.linspace(0.5, 0.0, len(is_kept), dtype=torch.double, device=is_kept.device)
    return (scores + order).topk(width, dim=-1).indices.sort(dim=-1).values


def same_view(grid: Grid, views: int, *, device: torch.device) -> Tensor:
    """Pairs of patches of the same view, ``[1, n, n]``."""
    n = math.prod(grid)
    view = torch.arange(n, device=device) // (n // views)
    return (view[:, None] == view)[None]


def strided_mask(grid: Grid, views: int, stride: int, *, device: torch.device) -> Tensor:
    """Pairs with a key on the grid of kept keys, and each patch with itself, ``[1, n, n]``."""
    kept = on_stride(grid, views, stride, device=device)
    return (kept | torch.eye(len(kept), dtype=torch.bool, device=device))[None]
