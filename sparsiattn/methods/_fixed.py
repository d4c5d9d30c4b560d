"""Patterns that are the same for every image: masks over the grid, and checks of their options."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsiattn import AttentionInputs, InvalidOption, InvalidType, Pattern

Grid = tuple[int, int]


def places(grid: Grid, *, device: torch.device) -> tuple[Tensor, Tensor]:
    """Row and column of every patch in raster order, ``[n]`` each, integers."""
    token = torch.arange(grid[0] * grid[1], device=device)
    return token // grid[1], token % grid[1]


def laid(keep: Tensor, inputs: AttentionInputs) -> Pattern:
    """The plan of a boolean ``[H|1, n, n]`` among the patches of `AttentionInputs.image_grid`.

    Where queries lie on another grid than keys, or tokens were dropped or merged, each one stands
    for the patch that it is nearest to. Rows and columns of prefix tokens are left to the core.
    """
    token_state = inputs.token_state
    if token_state is not None and token_state.reduced:
        ids = _left(inputs)
        mask = keep[:, ids[:, :, None], ids[:, None, :]].transpose(0, 1)
    elif inputs.query_grid != inputs.key_grid or inputs.site.halo:
        ids = inputs.table(_nearest, inputs.query_grid, inputs.key_grid, inputs.site.halo)
        mask = keep.index_select(-2, ids).unsqueeze(0)
    else:
        mask = keep.unsqueeze(0)
    prefix = inputs.prefix
    return Pattern.mask(F.pad(mask, (prefix, 0, prefix, 0)) if prefix else mask)


def _left(inputs: AttentionInputs) -> Tensor:
    """The patch nearest to each token that is left, ``[B, n]``."""
    grid, prefix = inputs.image_grid, inputs.prefix
    known = F.pad(torch.stack(places(grid, device=inputs.k.device), -1).float(), (0, 0, prefix, 0))
    at = inputs.gather_rows(known)[:, prefix:].round().long()
    return at[..., 0] * grid[1] + at[..., 1]


def _nearest(queries: Grid, keys: Grid, margin: int, *, device: torch.device) -> Tensor:
    """The key patch under the middle of every query, ``[n]``; queries lie over the keys but for a
    margin of key patches."""
    row, column = (
        ((at + 0.5) * (of - 2 * margin) / size + margin).long().clamp(0, of - 1)
        for at, of, size in zip(places(queries, device=device), keys, queries, strict=True)
    )
    return row * keys[1] + column


def both(rows: Tensor, columns: Tensor) -> Tensor:
    """Pairs of patches of which ``[R, R]`` allows the rows and ``[C, C]`` the columns, ``[n, n]``
    with n = R C: much cheaper than to compare the places of all pairs."""
    pairs = rows[:, None, :, None] & columns[None, :, None, :]
    return pairs.reshape(len(rows) * len(columns), -1)


def window(grid: Grid, side: int, dilation: int, *, device: torch.device) -> Tensor:
    """Pairs of patches at most ``side // 2`` steps of ``dilation`` apart in both directions,
    ``[n, n]``."""
    near = []
    for size in grid:
        at = torch.arange(size, device=device)
        apart = (at[:, None] - at).abs()
        near.append((apart <= side // 2 * dilation) & (apart % dilation == 0))
    return both(*near)


def lattice(grid: Grid, side: int, *, device: torch.device) -> Tensor:
    """Which patches are global, ``[n]``: the middles of side x side equal cells, fewer where the
    grid has fewer rows or columns."""
    row, column = places(grid, device=device)
    return _middle(row, grid[0], side) & _middle(column, grid[1], side)


def _middle(at: Tensor, size: int, side: int) -> Tensor:
    parts = min(side, size)
    middles = [(2 * part + 1) * size // (2 * parts) for part in range(parts)]
    found = torch.zeros_like(at, dtype=torch.bool)
    for middle in middles:
        found = found | (at == middle)
    return found


def local_and_global(
    grid: Grid, side: int, dilation: int, global_side: int, *, device: torch.device
) -> Tensor:
    """A window, and patches that see all and that all see, ``[1, n, n]``."""
    every = lattice(grid, global_side, device=device)
    keep = window(grid, side, dilation, device=device) | every | every[:, None]
    return keep.unsqueeze(0)


MOST = 2**31 - 1
"""No option counts further: tables of places are computed in 64 bits."""


def check_count(option: str, value: object, least: int) -> None:
    """An int that is at least ``least``, or an error that says so."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidType(f"{option} must be an int >= {least}, got {value!r}")
    if not least <= value <= MOST:
        most = "" if value < least else f" and at most {MOST}"
        raise InvalidOption(f"{option} must be an int >= {least}{most}, got {value!r}")


def check_odd(option: str, value: int) -> None:
    """An odd side, so that a window has a middle."""
    check_count(option, value, 1)
    if value % 2 == 0:
        raise InvalidOption(
            f"{option} must be odd, to have a middle; got {value}: pass {value + 1}"
        )


def check_flag(option: str, value: object) -> None:
    if not isinstance(value, bool):
        raise InvalidType(f"{option} must be True or False, got {value!r}")
