"""Orders of tokens other than the host's: squares and windows of patches, and tiles of frames."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsiattn import AttentionInputs, InvalidOption, Site, Structure
from sparsiattn.attention import geometry
from sparsiattn.attention.packing import Packing
from sparsiattn.attention.token_order import TokenOrder, alternated, depth_of
from sparsiattn.kernels.reference import Reference
from sparsiattn.registry.registry import REGISTRY
from sparsiattn.strategies.finalize import cell_parts, finish
from sparsiattn.strategies.local import nearness
from tests.support import by_image

CPU = torch.device("cpu")
SIDES = st.integers(1, 7)
Patch = tuple[int, int, int]


def raster(views: int, rows: int, columns: int) -> list[Patch]:
    return list(product(range(views), range(rows), range(columns)))


def alternating(views: int, rows: int, columns: int, depth: int) -> list[Patch]:
    """Row by row, the rows of ``depth`` frames after one another."""
    return [
        (first + frame, row, column)
        for first in range(0, views, depth)
        for row in range(rows)
        for frame in range(depth)
        for column in range(columns)
    ]


@settings(max_examples=40, deadline=None)
@given(
    groups=st.integers(1, 3), depth=st.integers(1, 3), rows=SIDES, columns=SIDES,
    merge=st.integers(1, 3), squares=st.none() | st.integers(1, 3),
    prefix=st.integers(0, 2), suffix=st.integers(0, 2), inner=st.integers(0, 2),
)  # fmt: skip
def test_orders_are_those_of_loops(
    groups: int, depth: int, rows: int, columns: int, merge: int, squares: int | None,
    prefix: int, suffix: int, inner: int,
) -> None:  # fmt: skip
    views = groups * depth
    window = None if squares is None else squares * merge
    places = by_image.squares(rows, columns, merge)
    if window is not None:
        places = [p for part in by_image.windows(rows, columns, window, merge) for p in part]
    host: list[Any] = ["first"] * prefix
    for view in range(views):
        host += ["special"] * inner + [(view, *place) for place in places]
    host += ["last"] * suffix
    order = TokenOrder(
        len(host), prefix, suffix, views, tuple(range(inner)), (rows, columns), merge, window, depth
    )
    found = [host[i] for i in order.pick(CPU).tolist()]
    special = len(host) - views * rows * columns
    assert found[:special] == ["first"] * prefix + ["special"] * inner * views + ["last"] * suffix
    assert found[special:] == alternating(views, rows, columns, depth)
    x = torch.arange(len(host))[:, None]
    assert torch.equal(order.undo(order.apply(x)), x)


@settings(max_examples=40, deadline=None)
@given(sizes=st.lists(st.tuples(st.integers(1, 3), SIDES, SIDES), min_size=1, max_size=4),
       merge=st.integers(1, 2), squares=st.none() | st.integers(1, 2))  # fmt: skip
def test_packed_parts_are_those_of_loops(
    sizes: list[Patch], merge: int, squares: int | None
) -> None:
    window = None if squares is None else squares * merge
    packing = Packing(tuple(sizes), merge, window)
    frames = by_image.frames_of(sizes, merge, window)
    assert [part.grid for part in packing.frames()] == [part.grid for part in frames]
    assert packing.tokens == sum(map(math.prod, sizes))
    for lengths in ([len(p.patches) for p in frames], [math.prod(size) for size in sizes]):
        parts = packing.follow(lengths)
        assert parts is not None
        assert [part.tokens for part in parts] == lengths
    if window is not None:
        windows = by_image.windows_of(sizes, merge, window)
        assert [part.grid for part in packing.windows()] == [part.grid for part in windows]
    assert packing.follow([packing.tokens + 1]) is None
    ids = [place[1:] for p in by_image.frames_of(sizes, merge) for place in p.patches]
    assert packing.fits(torch.tensor(ids))
    ids[-1] = (ids[-1][0], ids[-1][1] + 1)
    assert not packing.fits(torch.tensor(ids))


@settings(max_examples=40, deadline=None)
@given(groups=st.integers(1, 3), tile=st.tuples(*[st.integers(1, 3)] * 3), rows=st.integers(1, 3),
       columns=st.integers(1, 3))  # fmt: skip
def test_tiles_of_frames_are_boxes(groups: int, tile: Patch, rows: int, columns: int) -> None:
    """Where the sides of tiles divide those of the video, but for a single row of patches."""
    depth, height, width = tile
    size = groups * depth, rows * height, columns * width
    if depth * size[1] == 1:
        return
    patches = alternating(*size, depth)
    grid = size[0] * size[1], size[2]
    found = geometry.tiles(grid, alternated(tile, depth), groups, device=CPU)  # type: ignore[arg-type]
    boxes: dict[int, set[Patch]] = {}
    for token, slot in enumerate(found.slot.tolist()):
        frame, row, column = patches[token]
        boxes.setdefault(slot // found.size, set()).add(
            (frame // depth, row // height, column // width)
        )
    assert all(len(box) == 1 for box in boxes.values())
    assert found.size == math.prod(tile)


@settings(max_examples=40, deadline=None)
@given(views=st.integers(1, 12), sides=st.tuples(*[st.integers(1, 5)] * 3), rows=st.integers(2, 9),
       columns=st.integers(1, 9))  # fmt: skip
def test_tiles_never_exceed_their_sides(views: int, sides: Patch, rows: int, columns: int) -> None:
    depth = depth_of(sides, views)
    assert views % depth == 0
    assert 1 <= depth <= sides[0]
    tile = alternated(sides, depth)
    assert not isinstance(tile, int)
    patches = alternating(views, rows, columns, depth)
    found = geometry.tiles((views * rows, columns), tile, views // depth, device=CPU)
    assert found.size <= math.prod(sides)
    for tokens in found.order.tolist():
        frame, row, column = zip(*(patches[token] for token in tokens), strict=True)
        assert max(frame) - min(frame) < depth
        assert max(row) - min(row) <= sides[1]  # a row's frames may lie in two tiles
        assert max(column) - min(column) < sides[2]


@settings(max_examples=40, deadline=None)
@given(groups=st.integers(1, 3), depth=st.integers(1, 3), rows=st.integers(1, 5),
       columns=st.integers(1, 5), tile=st.none() | st.tuples(*[st.integers(1, 3)] * 2))  # fmt: skip
def test_distances_are_those_of_three_axes(
    groups: int, depth: int, rows: int, columns: int, tile: tuple[int, int] | None
) -> None:
    grid = groups * depth * rows, columns
    sides = tile if tile is None else alternated((depth, *tile), depth)
    found = nearness(grid, grid, sides or 1, 0, groups, depth, device=CPU)
    at = torch.tensor(alternating(groups * depth, rows, columns, depth), dtype=torch.double)
    queries = at
    if sides is not None:
        queries = geometry.tiles(grid, sides, groups, device=CPU).mean(at)  # type: ignore[arg-type]
    wanted = -(queries[:, None] - at[None]).square().sum(-1)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("depth", "g"), [(1, 2), (2, 2), (4, 4), (2, 1)])
def test_cells_are_boxes_of_frames(depth: int, g: int) -> None:
    frames, rows, columns = 4, 4, 8
    grid = frames * rows, columns
    cells = geometry.cell_ids(grid, cell_parts(grid, g, frames // depth), device=CPU)
    boxes: dict[int, set[Patch]] = {}
    for patch, cell in zip(alternating(frames, rows, columns, depth), cells.tolist(), strict=True):
        frame, row, column = patch
        boxes.setdefault(cell, set()).add((frame // depth, row * g // rows, column * g // columns))
    assert all(len(box) == 1 for box in boxes.values())
    assert len(boxes) == frames // depth * g * g


def video(size: Patch, prefix: int = 1) -> tuple[Site, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, prefix + math.prod(size), 8) * 1.5
    structure = Structure(size[1:], size[0], prefix=prefix, source="by hand")
    return Site.of(q, k, v).described(structure), q, k, v


def boxes_of(size: Patch, tile: Patch) -> list[list[int]]:
    """Tokens of every tile of a video in raster order, without the prefix."""
    boxes: dict[Patch, list[int]] = {}
    for token, place in enumerate(raster(*size)):
        box = tuple(at // side for at, side in zip(place, tile, strict=True))
        boxes.setdefault(box, []).append(token)  # type: ignore[arg-type]
    return list(boxes.values())


def by_boxes(operands: Any, size: Patch, tile: Patch, count: int, prefix: int) -> Tensor:
    """Attention in which every tile keeps its strongest keys, by loops."""
    q, k, v = operands
    logits = q @ k.mT / math.sqrt(q.shape[-1])
    keep = torch.ones(logits.shape, dtype=torch.bool)
    for box in boxes_of(size, tile):
        tokens = [token + prefix for token in box]
        score = logits[:, :, tokens].softmax(-1).mean(2)[..., prefix:]
        best = score.sort(-1, descending=True).indices[..., : count - prefix] + prefix
        row = torch.zeros(*logits.shape[:2], logits.shape[-1], dtype=torch.bool)
        row.scatter_(-1, best, True)
        row[..., :prefix] = True
        keep[:, :, tokens] = row[:, :, None]
    return logits.masked_fill(~keep, float("-inf")).softmax(-1) @ v


@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize("tile", [(2, 2, 2), (4, 2, 4), (1, 2, 2), (2, 4, 1)], ids=str)
@pytest.mark.parametrize("name", ["topk", "local"])
def test_tiles_of_frames_share_their_keys(name: str, tile: Patch, prefix: int) -> None:
    from sparsiattn.attention.layout import HostCall, Layout, canonical, host_order

    size = 4, 4, 8
    site, *operands = video(size, prefix)
    strategy = REGISTRY.get("strategies", name)(k=26, tile=tile, background=None)
    inputs = canonical(
        site, Layout("b h n d", 2), HostCall(*operands), None, tile_for=strategy.tile_for,
        block_for=strategy.block_for, depth_for=strategy.depth_for,
    )  # fmt: skip
    out = Reference()(inputs, finish(strategy.planner(site)(inputs), inputs))
    if name == "local":  # of equally near keys, any may be kept
        keep = finish(strategy.planner(site)(inputs), inputs).to_mask()
        assert keep[0, 0].sum(-1)[prefix:].eq(26).all()
        distances(host_order(keep.mT, inputs).mT, inputs, size, tile, prefix)
    else:
        wanted = by_boxes(operands, size, tile, 26, prefix)
        torch.testing.assert_close(host_order(out, inputs), wanted)


def distances(keep: Tensor, inputs: AttentionInputs, size: Patch, tile: Patch, prefix: int) -> None:
    """Every tile keeps keys as near as the nearest ones."""
    order = inputs.order
    rows = keep[0, 0] if order is None else order.undo(keep[0, 0])
    at = torch.tensor(raster(*size), dtype=torch.double)
    for box in boxes_of(size, tile):
        far = (at[box].mean(0) - at).square().sum(-1)
        for token in box:
            kept = rows[token + prefix, prefix:]
            assert rows[token + prefix, :prefix].all()
            nearest = far.sort().values[: 26 - prefix]
            torch.testing.assert_close(far[kept].sort().values, nearest)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("connectivity", {"tile": (2, 4)}, None),
        ("connectivity", {"tile": (2, 4, 4), "block": (2, 2, 2)}, None),
        ("connectivity", {"tile": (2, 4, 4), "block": (2, 2)}, "as many frames as tile"),
        ("connectivity", {"tile": (4, 4), "block": (2, 2, 2)}, "as many frames as tile"),
        ("connectivity", {"tile": (2, 4, 4, 1)}, "frames, rows, columns"),
        ("longformer", {"tile": (2, 4, 4)}, "cannot span several frames"),
    ],
)
def test_options(name: str, options: dict[str, Any], message: str | None) -> None:
    kind = REGISTRY.get("strategies", name)
    if message is None:
        strategy = kind(**options)
        assert kind.from_dict(strategy.to_dict()) == strategy
        return
    with pytest.raises(InvalidOption, match=message):
        kind(**options)
