"""Sequences of several images: tiles, blocks, summary keys and windows keep them apart."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import sparsiattn
from sparsiattn.attention import geometry
from sparsiattn.attention.auto_options import MOST_CELLS, auto_background
from sparsiattn.errors import InvalidOption
from sparsiattn.strategies.finalize import cell_parts
from sparsiattn.strategies.local import nearness
from tests.support.across_views import AcrossViews

CPU = torch.device("cpu")
SIDES = st.tuples(st.integers(2, 9), st.integers(1, 9))
TILES = st.tuples(st.integers(1, 5), st.integers(1, 5))
VIEWS = st.integers(1, 4)


def cut(ids: Tensor, views: int) -> list[Tensor]:
    """The part of each view, counted from its least."""
    parts = ids.view(views, -1)
    return [part - part.min() for part in parts]


def apart(ids: Tensor, views: int) -> bool:
    """Whether no id is in two views, and each view is cut as the first."""
    parts = ids.view(views, -1)
    sets = [set(part.tolist()) for part in parts]
    disjoint = len(set.union(*sets)) == sum(map(len, sets))
    return disjoint and all(torch.equal(part, cut(ids, views)[0]) for part in cut(ids, views))


@given(sides=SIDES, tile=TILES, views=VIEWS)
def test_tiles_are_those_of_each_view(
    sides: tuple[int, int], tile: tuple[int, int], views: int
) -> None:
    stacked = views * sides[0], sides[1]
    found = geometry.tiles(stacked, tile, views, device=CPU)
    one = geometry.tiles(sides, tile, device=CPU)
    assert apart(found.slot // found.size, views)
    assert torch.equal(cut(found.slot // found.size, views)[0], one.slot // one.size)
    assert found.size == one.size
    assert found.size <= math.prod(tile)


@given(sides=SIDES, tile=TILES, side=st.integers(1, 4), views=VIEWS)
def test_voters_lie_in_their_tile(
    sides: tuple[int, int], tile: tuple[int, int], side: int, views: int
) -> None:
    stacked = views * sides[0], sides[1]
    tiles = geometry.tiles(stacked, tile, views, device=CPU)
    squares, order = geometry.voters(stacked, tile, side, views, device=CPU)
    of_tile = tiles.slot // tiles.size
    for place, square in enumerate(order.tolist()):
        wanted = place // (len(order) // tiles.count)
        assert (of_tile[squares.order[square]] == wanted).all()


@given(sides=SIDES, g=st.integers(1, 6), views=VIEWS)
def test_summary_keys_are_those_of_each_view(sides: tuple[int, int], g: int, views: int) -> None:
    stacked = views * sides[0], sides[1]
    ids = geometry.cell_ids(stacked, cell_parts(stacked, g, views), device=CPU)
    assert apart(ids, views)
    one = geometry.cell_ids(sides, cell_parts(sides, g), device=CPU)
    assert torch.equal(cut(ids, views)[0], one)


@pytest.mark.parametrize("views", [1, 2, 6, 20, 100, 300])
def test_summary_keys_stay_few(views: int) -> None:
    grid = views * 28, 37
    g = auto_background(grid, views)
    assert g >= 1
    assert math.prod(cell_parts(grid, g, views)) <= MOST_CELLS


@given(sides=SIDES, views=VIEWS, tile=st.none() | TILES)
def test_nearness_is_that_of_a_loop(
    sides: tuple[int, int], views: int, tile: tuple[int, int] | None
) -> None:
    """A view is one patch from the next."""
    grid = views * sides[0], sides[1]
    found = nearness(grid, grid, tile or 1, 0, views, device=CPU)
    places = [
        (row, column, view)
        for view in range(views)
        for row in range(sides[0])
        for column in range(sides[1])
    ]
    at = torch.tensor(places, dtype=torch.float)
    rows = at if tile is None else geometry.tiles(grid, tile, views, device=CPU).mean(at)
    wanted = -(rows[:, None] - at[None]).square().sum(-1)
    torch.testing.assert_close(found.float(), wanted, rtol=1e-4, atol=1e-4)


LINES = [
    {"strategy": "connectivity", "k": 0.3, "tile": (4, 4), "background": 2},
    {"strategy": "connectivity", "k": 0.3, "tile": (4, 4), "block": (2, 2), "background": 1},
    {"strategy": "topk", "k": 0.3, "background": "auto"},
]


@pytest.mark.parametrize("line", LINES, ids=str)
def test_the_order_of_views_does_not_matter(line: dict[str, object]) -> None:
    """Only the first view has a camera token of its own, so the others may change places."""
    torch.manual_seed(0)
    model, order = AcrossViews(size=(56, 72)).eval(), [0, 3, 1, 2]
    images = torch.randn(1, 4, 3, 56, 72)
    with torch.no_grad(), sparsiattn.patch(model, **line, input=images) as patch:  # type: ignore[arg-type]
        depths, cameras = model(images)
        moved, moved_cameras = model(images[:, order])
        assert any(site.views == 4 for site in patch.sites)
    torch.testing.assert_close(moved, depths[:, order], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(moved_cameras, cameras[:, order], rtol=1e-3, atol=1e-3)


def test_a_window_of_one_image_is_refused_by_name() -> None:
    model, images = AcrossViews().eval(), torch.randn(1, 2, 3, 32, 48)
    with pytest.raises(InvalidOption, match="2 x 4 x 6 patches, 1 special token in every view"):
        sparsiattn.patch(model, "longformer", input=images)


@pytest.mark.parametrize("option", [{"tile": (8, 8)}, {"background": 7}])
def test_what_does_not_fit_one_view_is_refused(option: dict[str, object]) -> None:
    model, images = AcrossViews().eval(), torch.randn(1, 3, 3, 32, 48)
    with pytest.raises(InvalidOption, match="4 x 6"):
        sparsiattn.patch(model, "connectivity", k=0.3, input=images, **option)  # type: ignore[arg-type]
