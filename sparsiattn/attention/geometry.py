"""Index tables over a 2-D token grid: cells, tiles, pooling, interpolation.

Tokens are in raster order, prefix tokens first. Tables depend on a few integers only, so they are
built once per device and cached. While a compiler traces, they are rebuilt from plain tensor
operations, because a cache would be a side effect of the traced program.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from sparsiattn.attention.derivatives import is_exporting, is_tracing, outside_transforms

Grid = tuple[int, int]
"""Rows and columns of patch tokens."""
Tile = int | tuple[int, int]
"""Patches side by side: 1, or rows and columns."""
Sides = tuple[int, ...]
"""Rows and columns; or frames, rows and columns."""
T = TypeVar("T")

_TABLES: dict[Any, Any] = {}
_CAPTURED: dict[Any, Any] = {}
"""Tables that CUDA graphs read by address, so they live as long as the process."""
_MOST_ELEMENTS = 1 << 25  # 128 MiB of float32
_LOCK = threading.Lock()


def table(build: Callable[..., T], *key: Any, device: torch.device) -> T:
    """``build(*key, device=device)``, cached by its arguments."""
    # Dynamo would guard on a cached tensor; `torch.export` takes it as a constant
    if torch.compiler.is_dynamo_compiling():
        return build(*key, device=device)
    full_key = (build, key, device)
    try:
        built: T | None = _CAPTURED.get(full_key)
    except TypeError:  # an exporter's symbolic sizes have no hash
        return build(*key, device=device)
    built = _TABLES.get(full_key) if built is None else built
    if built is None:
        return _built(build, full_key)
    if _is_capturing(device):
        _hold(full_key, built)
    return built


def _built(build: Callable[..., T], full_key: Any) -> T:
    """Build a table, and cache it once other threads and streams may read it."""
    _, key, device = full_key
    # an inference tensor kept from a warm-up would break a later training step
    with torch.inference_mode(False), outside_transforms():
        built = build(*key, device=device)
    # `torch.jit.trace` would record what is asked of the cached tables. A table that a graph builds
    # has no values before it is replayed.
    lasts = not (is_tracing() or _is_capturing(device))
    if lasts and all(map(_is_lasting, _parts(built))):
        wait_for_values(device)
        _keep(full_key, built)
    return built


def _is_lasting(part: Tensor) -> bool:
    """Whether a tensor may be cached: a fake one (of a tracing mode) must not outlive its mode."""
    return type(part) is Tensor


def wait_for_values(device: torch.device) -> None:
    """Wait until tensors have their values, before they are cached for other threads.

    On a GPU, their streams do not wait for the stream of this thread.
    """
    if device.type == "cuda" and torch.cuda.is_initialized():
        torch.cuda.current_stream(device).synchronize()


def _is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph records the operations of this thread."""
    if device.type != "cuda" or not torch.cuda.is_initialized():
        return False
    return torch.cuda.is_current_stream_capturing()


def _hold(key: Any, built: object) -> None:
    """Keep a cached table for good."""
    with _LOCK:
        _CAPTURED.setdefault(key, built)
        _TABLES.pop(key, None)


def hold_if_captured(built: object, *key: Any, device: torch.device) -> None:
    """Keep for good what another cache may evict, if a CUDA graph is about to read it."""
    if _is_capturing(device):
        _hold((key, device), built)


def _keep(key: Any, built: object) -> None:
    """Cache a table and evict the oldest ones; a table above the limit is not cached."""
    if _elements(built) > _MOST_ELEMENTS:
        return
    with _LOCK:
        while _TABLES and _elements(*_TABLES.values(), built) > _MOST_ELEMENTS:
            _TABLES.pop(next(iter(_TABLES)))
        _TABLES[key] = built


def _elements(*tables: object) -> int:
    return sum(part.numel() for built in tables for part in _parts(built))


def _parts(built: Any) -> list[Tensor]:
    """Tensors of a cached value: a tensor, a tuple of tensors, or `Tiles`."""
    parts = vars(built).values() if isinstance(built, Tiles) else tree_leaves(built)
    return [part for part in parts if isinstance(part, Tensor)]


def infer_grid(n: int, aspect: float = 1.0) -> Grid:
    """Rows and columns with ``rows * columns == n`` whose ratio is nearest to ``aspect``.

    ``aspect`` is height / width of the image. A prime ``n`` gives one row.

    >>> infer_grid(196), infer_grid(98, aspect=0.5), infer_grid(13)
    ((14, 14), (7, 14), (1, 13))
    """
    best, off = 1, math.inf
    for small in range(1, math.isqrt(n) + 1):
        for rows in (small, n // small) if n % small == 0 else ():
            distance = abs(math.log(rows * rows / n / aspect))
            if distance < off or (distance == off and rows < best):
                best, off = rows, distance
    return best, n // best


def skew(n: int, aspect: float = 1.0) -> float:
    """Distance (log ratio) of the best grid of ``n`` tokens from the aspect ratio; 0 if equal.

    >>> skew(196) < skew(195) < skew(197)
    True
    """
    rows, columns = infer_grid(n, aspect)
    return abs(math.log(rows / columns / aspect))


def positions(grid: Grid, *, device: torch.device) -> Tensor:
    """Centre of every token in unit coordinates (row, column), ``[n, 2]``, both in (0, 1)."""
    rows, columns = (torch.arange(size, device=device) for size in grid)
    y = ((rows + 0.5) / grid[0]).repeat_interleave(grid[1])
    x = ((columns + 0.5) / grid[1]).repeat(grid[0])
    return torch.stack([y, x], dim=-1)


def cell_ids(grid: Grid, cells: Grid, *, device: torch.device) -> Tensor:
    """Cell of every token, ``[n]``, when the grid is cut into ``cells`` near-equal rectangles.

    >>> cell_ids((2, 4), (1, 2), device=torch.device("cpu")).tolist()
    [0, 0, 1, 1, 0, 0, 1, 1]
    """
    rows, columns = (
        torch.arange(size, device=device) * parts // size
        for size, parts in zip(grid, cells, strict=True)
    )
    return (rows[:, None] * cells[1] + columns[None, :]).flatten()


def pooling(grid: Grid, cells: Grid, *, device: torch.device) -> Tensor:
    """Averages tokens over cells: ``[n, cells]`` whose columns each sum to one."""
    ids = cell_ids(grid, cells, device=device)
    member = (ids[:, None] == torch.arange(cells[0] * cells[1], device=device)).float()
    return member / member.sum(0).clamp_min(1.0)


def interpolation(grid: Grid, cells: Grid, *, device: torch.device) -> Tensor:
    """Bilinear weights from cell centres back to tokens: ``[n, cells]`` whose rows sum to one."""
    ways = [_tent(size, parts, device) for size, parts in zip(grid, cells, strict=True)]
    return torch.einsum("ra,cb->rcab", *ways).reshape(grid[0] * grid[1], cells[0] * cells[1])


def _tent(size: int, parts: int, device: torch.device) -> Tensor:
    """1-D linear interpolation weights ``[size, parts]``, constant beyond the outer centres."""
    at = (torch.arange(size, device=device) + 0.5) * parts / size - 0.5
    distance = (at.clamp(0, parts - 1)[:, None] - torch.arange(parts, device=device)).abs()
    return (1 - distance).clamp_min(0.0)


def nested_rank(grid: Grid, outer: Grid, inner: Grid, *, device: torch.device) -> Tensor:
    """Position of every token, ``[n]``, in an order that keeps image neighbours together.

    The order goes tile by tile, and block by block within a tile.

    Args:
        grid: Rows and columns of the tokens.
        outer: Rows and columns of a tile.
        inner: Rows and columns of a block.
        device: Device of the result.

    >>> nested_rank((2, 4), (2, 2), (1, 2), device=torch.device("cpu")).tolist()
    [0, 1, 4, 5, 2, 3, 6, 7]
    """
    n = grid[0] * grid[1]
    large, small = (
        cell_ids(grid, tile_parts(grid, sides), device=device) for sides in (outer, inner)
    )
    order = torch.argsort((large * n + small) * n + torch.arange(n, device=device))
    return torch.argsort(order)


@dataclass(frozen=True, eq=False)
class Tiles:
    """Queries grouped into compact 2-D tiles.

    Attributes:
        order: Token of every slot, ``[T, t]``; a tile smaller than ``t`` repeats its last token.
        slot: Position of each token in the flattened tiles, ``[n]``.
        weight: ``[T, t]``, zero on repeated slots, each row summing to one; averages over a tile.
        smallest: Number of tokens of the smallest tile.
        parts: Number of tiles in each direction.
        columns: Number of columns of the grid.
    """

    order: Tensor
    slot: Tensor
    weight: Tensor
    smallest: int
    parts: Grid
    columns: int

    @property
    def size(self) -> int:
        """Number of slots of a tile, t."""
        return self.order.shape[1]

    @property
    def count(self) -> int:
        """Number of tiles, T."""
        return self.order.shape[0]

    @property
    def even(self) -> bool:
        """Whether all tiles have the same size, so that no slot repeats a token."""
        return self.order.numel() == self.slot.numel()

    @property
    def _sides(self) -> tuple[int, int, int, int]:
        """R, r, C, c: rows of tiles and rows in a tile, then the same for columns (even tiles)."""
        inner = self.columns // self.parts[1]
        return self.parts[0], self.size // inner, self.parts[1], inner

    def view(self, x: Tensor) -> Tensor:
        """``[..., n, D]`` as ``[..., R, C, r, c, D]``: R x C even tiles of r x c; no copy."""
        split: Tensor = x.unflatten(-2, self._sides)
        return split.transpose(-4, -3)

    def split(self, x: Tensor) -> Tensor:
        """``[..., T, t, D]`` as ``[..., R, C, r, c, D]``, without a copy; for even tiles."""
        split: Tensor = x.unflatten(-3, self.parts).unflatten(-2, self._sides[1::2])
        return split

    def gather(self, x: Tensor) -> Tensor:
        """``[..., n, D]`` to ``[..., T, t, D]``."""
        rows = x.index_select(-2, self.order.flatten())
        return rows.reshape(*x.shape[:-2], *self.order.shape, x.shape[-1])

    def mean(self, x: Tensor) -> Tensor:
        """``[..., n, D]`` to the mean over every tile, ``[..., T, D]``."""
        if is_exporting():  # runtimes are slow to sum along any axis but the last
            return (self.weight.to(x.dtype).unsqueeze(-2) @ self.gather(x)).squeeze(-2)
        if self.even and x.dim() == 4:
            return self._mean_by_sides(x)
        return (self.gather(x) * self.weight.to(x.dtype).unsqueeze(-1)).sum(-2)

    def _mean_by_sides(self, x: Tensor) -> Tensor:
        """The mean without a copy, in the layout that hosts use, ``[B, n, H, D]``."""
        tokens: Tensor = x.transpose(1, 2).unflatten(1, self._sides)
        # two steps are fastest on a CPU; on a GPU, one saves a launch
        means = tokens.mean(2).mean(3) if x.is_cpu else tokens.mean((2, 4))
        return means.flatten(1, 2).transpose(1, 2)

    def weigh(self, x: Tensor) -> Tensor:
        """Slots ``[..., T, t]`` to their mean over each tile, ``[..., T]``."""
        return x.mean(-1) if self.even else (x * self.weight.to(x.dtype)).sum(-1)

    def scatter(self, x: Tensor) -> Tensor:
        """``[..., T, t, D]`` back to tokens, ``[..., n, D]``."""
        return x.flatten(-3, -2).index_select(-2, self.slot)

    def spread(self, x: Tensor) -> Tensor:
        """One row per tile ``[..., T, D]`` to one per token ``[..., n, D]``."""
        return x.index_select(-2, self.slot // self.size)


def tile_parts(grid: Grid, tile: tuple[int, int], views: int = 1) -> Grid:
    """How many tiles in each direction.

    A single row of tokens is cut into runs of rows x columns. The views of a grid are stacked
    vertically and cut in the same way, so no tile spans two of them.

    >>> tile_parts((14, 14), (8, 8)), tile_parts((1, 100), (8, 8)), tile_parts((9, 3), (2, 3), 3)
    ((2, 2), (1, 2), (6, 1))
    """
    if grid[0] == 1:
        return 1, math.ceil(grid[1] / (tile[0] * tile[1]))
    return views * math.ceil(grid[0] / views / tile[0]), math.ceil(grid[1] / tile[1])


def own_shares(
    grid: Grid,
    tile: tuple[int, int],
    block: int | tuple[int, int],
    views: int = 1,
    *,
    device: torch.device,
) -> Tensor:
    """The share of a tile's tokens that each key (or block of keys) makes up.

    Returns:
        ``[T, n]`` for single keys, ``[T, blocks]`` for blocks; rows sum to one.

    >>> own_shares((1, 4), (1, 2), 1, device=torch.device("cpu"))
    tensor([[0.5000, 0.5000, 0.0000, 0.0000],
            [0.0000, 0.0000, 0.5000, 0.5000]])
    """
    parts = tile_parts(grid, tile, views)
    units = grid if isinstance(block, int) else tile_parts(grid, block, views)
    rows, columns = (cell_ids(grid, cells, device=device) for cells in (parts, units))
    counts = torch.zeros(math.prod(parts), math.prod(units), device=device)
    counts.index_put_((rows, columns), torch.ones(len(rows), device=device), accumulate=True)
    return counts / counts.sum(1, keepdim=True)


def tiles(grid: Grid, tile: tuple[int, int], views: int = 1, *, device: torch.device) -> Tiles:
    """The tiles of a grid: at most ``tile`` (rows, columns) large, and as equal as possible."""
    return tiles_of_parts(grid, tile_parts(grid, tile, views), device=device)


def voters(
    grid: Grid, tile: tuple[int, int], side: int, views: int = 1, *, device: torch.device
) -> tuple[Tiles, Tensor]:
    """Small tiles of at most ``side`` x ``side`` tokens into which every tile is cut.

    Returns:
        The small tiles, and their order tile by tile, ``[T * m]``.

    >>> voters((4, 4), (4, 2), 2, device=torch.device("cpu"))[1].tolist()
    [0, 2, 1, 3]
    """
    parts = tile_parts(grid, tile, views)
    wanted = (
        (1, math.ceil(tile[0] * tile[1] / side**2))
        if grid[0] == 1
        else (math.ceil(tile[0] / side), math.ceil(tile[1] / side))
    )
    # no small tile is empty, and none crosses the edge of a tile, since nested floors agree
    rows, columns = (max(1, min(w, n // p)) for w, n, p in zip(wanted, grid, parts, strict=True))
    small = tiles_of_parts(grid, (parts[0] * rows, parts[1] * columns), device=device)
    ids = torch.arange(small.count, device=device).view(parts[0], rows, parts[1], columns)
    return small, ids.transpose(1, 2).flatten()


def voter_tokens(
    grid: Grid, tile: tuple[int, int], side: int, views: int = 1, *, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Tokens of every voter, tile by tile, ``[T * m, s]``, and how many are distinct, ``[T * m]``.

    >>> voter_tokens((2, 2), (2, 2), 1, device=torch.device("cpu"))[0].flatten().tolist()
    [0, 1, 2, 3]
    """
    squares, places = voters(grid, tile, side, views, device=device)
    counts = (squares.weight > 0).sum(-1)
    return squares.order.index_select(0, places), counts.index_select(0, places)


def tiles_of_parts(grid: Grid, parts: Grid, *, device: torch.device) -> Tiles:
    """A grid cut into ``parts`` = (rows, columns) of tiles."""
    ids = cell_ids(grid, parts, device=device)
    count, n = parts[0] * parts[1], grid[0] * grid[1]
    size = math.ceil(grid[0] / parts[0]) * math.ceil(grid[1] / parts[1])
    order = torch.argsort(ids, stable=True)
    lengths = torch.zeros_like(ids[:1]).expand(count).scatter_add(0, ids, torch.ones_like(ids))
    starts = lengths.cumsum(0) - lengths
    place = torch.arange(size, device=device)
    inside = place < lengths[:, None]
    pick = starts[:, None] + torch.minimum(place.expand(count, size), lengths[:, None] - 1)
    rank = torch.argsort(order) - starts[ids]
    return Tiles(
        order=order[pick.flatten()].view(count, size),
        slot=ids * size + rank,
        weight=inside / lengths[:, None].float() if n else inside.float(),
        smallest=(grid[0] // parts[0]) * (grid[1] // parts[1]),
        parts=parts,
        columns=grid[1],
    )
