"""A 2-D window of nearest patches, as in neighbourhood attention."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsiattn.attention import geometry
from sparsiattn.attention.geometry import Grid, Tile
from sparsiattn.attention.inputs import AttentionInputs
from sparsiattn.attention.key_lists import KeyIndex
from sparsiattn.attention.neighbourhood import neighbourhood
from sparsiattn.attention.pattern import Pattern
from sparsiattn.errors import InvalidOption
from sparsiattn.strategies.base import Budgets, Strategy


@dataclass(frozen=True)
class Local(Strategy):
    """The nearest patches in the image grid (at the border, windows keep their full size).

    Distances are Euclidean, between patch centres; if keys are pooled, their grid covers the same
    image as that of the queries. With tiles, the keys nearest to the tile's centre are kept.

    Args:
        k: Share or count of the keys, one for all sites, a list, or a function of the `Site`.
        background: As in `Strategy`.
        window: Rows and columns of a rectangle of patches, or one number for both; it replaces
            ``k``. Lists are then exactly those of NATTEN, and of its stride if there are tiles. Its
            kernels (``kernel="natten"``) need ``background=None``.
    """

    name = "local"
    paper = "https://arxiv.org/abs/2204.07143"
    fidelity = "inspired by neighbourhood attention: the k nearest keys on the grid, any share"

    needs_grid = True
    supports_views = True
    supports_frames = True

    k: Budgets = 0.25
    background: int | str | None = field(default=2, kw_only=True)
    window: int | tuple[int, int] | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "window", _check_window(self.window))

    def keeps_all(self, n_keys: int) -> bool:
        return self.window is None and super().keeps_all(n_keys)

    def plan(self, inputs: AttentionInputs) -> Pattern:
        if self.window is not None:
            return _windows(inputs, self.window, self.prefix_keys)  # type: ignore[arg-type]
        if inputs.reduced is None:
            views = inputs.views if inputs.views == inputs.key_views else 1
            block = 1 if inputs.blocks is None else inputs.block
            grids = inputs.query_grid, inputs.key_grid
            depth = 1 if inputs.order is None else inputs.order.depth
            # tiles lie within images of the queries, also where keys are pooled
            tiled = inputs.prefix, inputs.tile, block, inputs.site.halo, views, depth, inputs.views
            # a compiled program builds the table again in every call, where sorting takes too long
            build = unique_nearness if torch.compiler.is_dynamo_compiling() else nearness_ranks
            scores = inputs.table(build, *grids, *tiled)
        else:
            scores = _nearness_of_remaining(inputs, inputs.reduced.grid)
        return Pattern.top(scores, self.k)  # type: ignore[arg-type]


def _check_window(window: object) -> Grid | None:
    sides = (window, window) if type(window) is int else window
    if sides is None:
        return None
    given = tuple(sides) if isinstance(sides, (tuple, list)) else ()
    if len(given) == 2 and all(type(side) is int and side >= 1 for side in given):
        return given
    raise InvalidOption(
        f"window must be None, a number or (rows, columns) of patches, each >= 1; got {window!r}"
    )


def _windows(inputs: AttentionInputs, window: Grid, prefix_keys: bool) -> Pattern:
    """The exact neighbourhoods of all queries or tiles."""
    grid, halo = inputs.query_grid, inputs.site.halo
    if inputs.reduced is not None or grid != inputs.key_grid or halo or inputs.views > 1:
        raise InvalidOption(
            f"window= needs the same complete grid of one image for queries and keys, and site "
            f"{inputs.site.name!r} has queries of {grid} and keys of {inputs.key_grid}, halo "
            f"{halo}, {inputs.views} images in a sequence"
            f"{', and dropped tokens' if inputs.reduced is not None else ''}: use k= instead"
        )
    size = min(window[0], grid[0]), min(window[1], grid[1])
    if size == grid and (prefix_keys or not inputs.prefix):
        return Pattern.dense(inputs.n_queries, inputs.n_keys)
    parts = None if inputs.tiles is None else geometry.tile_parts(grid, inputs.tile)  # type: ignore[arg-type]
    prefix = inputs.prefix if prefix_keys else 0
    index = inputs.table(neighbourhood, grid, size, parts, prefix)
    if prefix != inputs.prefix:
        index = index + inputs.prefix
    return KeyIndex.of(inputs, index, size)


STEPS = 4096
"""Squared distances are rounded to this part of a key patch, so that equal ones are equal."""
MOST_RANKS = 1 << 25
"""Larger tables are not cached, so they are not sorted either."""


def nearness_ranks(*args: Any, device: torch.device) -> Tensor:
    """The rows of `unique_nearness` as ranks in float32, 0 for the best key, then -1, -2, ..."""
    scores = unique_nearness(*args, device=device)
    if scores.numel() > MOST_RANKS:
        return scores
    order = scores.argsort(dim=-1, descending=True)
    ranks = -torch.arange(scores.shape[-1], device=device, dtype=torch.float)
    return torch.zeros_like(scores, dtype=torch.float).scatter(-1, order, ranks.expand_as(scores))


def unique_nearness(
    queries: Grid,
    keys: Grid,
    prefix: int,
    tile: Tile,
    block: Tile,
    halo: int,
    views: int = 1,
    depth: int = 1,
    tile_views: int | None = None,
    *,
    device: torch.device,
) -> Tensor:
    """Scores of keys ``[1, 1, R, prefix + m]``, or of blocks ``[1, 1, R, U]``, the nearest best.

    Among equally near keys the first has the higher score, so that all devices keep the same keys.
    Prefix keys get the lowest scores; the core keeps them if the user wants it.

    Args:
        queries: Grid of the patch queries.
        keys: Grid of the patch keys, over the same image.
        prefix: Number of prefix keys.
        tile: As in `AttentionInputs`.
        block: As in `AttentionInputs`; 1 for scores of single keys.
        halo: Number of key patches by which keys extend beyond the queries on every side.
        views: Number of images or frames in the grids; they are one patch apart.
        depth: Number of frames whose rows alternate within each view; see `TokenOrder`.
        tile_views: Number of images or frames that tiles do not cross; None for ``views``.
        device: Device of the result.
    """
    scores = nearness(queries, keys, tile, halo, views, depth, tile_views, device=device)
    if not isinstance(block, int):
        scores = geometry.tiles(keys, block, views, device=device).mean(scores.mT).mT
        prefix = 0
    scores = _first_of_equals(scores)
    first = torch.arange(prefix, device=device, dtype=scores.dtype)
    last = (scores.min() - 1 - first).expand(len(scores), prefix)
    return torch.cat([last, scores], dim=-1)[None, None]


def nearness(
    queries: Grid,
    keys: Grid,
    tile: Tile,
    halo: int,
    views: int = 1,
    depth: int = 1,
    tile_views: int | None = None,
    *,
    device: torch.device,
) -> Tensor:
    """Minus the squared distance in units of key patches, ``[R, m]``.

    Distances are from every patch query, or from the centre of every tile. (The mean squared
    distance from a tile's queries differs by a constant, so it would rank keys in the same way.)
    The arguments are those of `unique_nearness`.
    """
    frames = views * depth
    sides = (keys[0] // frames, keys[1], frames)
    size = torch.tensor(sides, device=device, dtype=torch.double)
    inner = torch.tensor([halo, halo, 0.0], device=device, dtype=torch.double)
    q = places(queries, views, depth, device=device) * (size - 2 * inner) + inner
    k = places(keys, views, depth, device=device) * size
    if not isinstance(tile, int):
        q = geometry.tiles(queries, tile, tile_views or views, device=device).mean(q)
    apart = [(q[:, None, axis] - k[None, :, axis]).square() for axis in range(3)]
    return -(apart[0] + apart[1] + apart[2])


def places(grid: Grid, views: int, depth: int = 1, *, device: torch.device) -> Tensor:
    """Row, column and frame of every token, ``[n, 3]``, in unit coordinates, float64, in (0, 1).

    >>> places((4, 1), 2, device=torch.device("cpu")).tolist()[2]
    [0.25, 0.5, 0.75]
    >>> places((4, 1), 1, 2, device=torch.device("cpu")).tolist()[1]
    [0.25, 0.5, 0.75]
    """
    frames = views * depth
    frame, row, column = (
        (torch.arange(side, device=device, dtype=torch.double) + 0.5) / side
        for side in (frames, grid[0] // frames, grid[1])
    )
    shape = views, len(row), depth, len(column)
    axes = row[:, None, None], column, frame.view(views, 1, depth, 1)
    return torch.stack([axis.expand(shape) for axis in axes], dim=-1).flatten(0, 3)


def _nearness_of_remaining(inputs: AttentionInputs, grid: Grid) -> Tensor:
    """`unique_nearness` for the tokens that remain of a grid, ``[B, 1, R, P + n]``."""
    views = inputs.site.views if grid[0] % inputs.site.views == 0 else 1
    sides = [grid[0] // views, grid[1], views]
    size = torch.tensor(sides, device=inputs.k.device, dtype=torch.double)
    positions = inputs.table(places, grid, views) * size
    # prefix tokens have no position; their rows are padded with zeros
    patches = inputs.gather_rows(F.pad(positions, (0, 0, inputs.prefix, 0)))[:, inputs.prefix :]
    rows = patches if inputs.tiles is None else inputs.tiles.mean(patches)
    score = -(rows[:, :, None] - patches[:, None]).square().sum(-1)
    score = _first_of_equals(score)
    last = score.amin((1, 2), keepdim=True).expand(-1, score.shape[1], inputs.prefix) - 1
    return torch.cat([last, score], dim=-1).unsqueeze(1)


def _first_of_equals(scores: Tensor) -> Tensor:
    """Scores ``[..., m]`` in steps, each lowered by less than one step with its index."""
    count = scores.shape[-1]
    earlier = torch.arange(count, device=scores.device, dtype=scores.dtype) / (2 * count)
    return (scores * STEPS).round() - earlier
