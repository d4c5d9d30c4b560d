"""Tables over the token grid, against plain loops."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from sparsiattn.attention import geometry

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SIDES = st.tuples(st.integers(1, 13), st.integers(1, 13))


@settings(max_examples=60, deadline=None)
@given(grid=SIDES, tile=st.tuples(st.integers(1, 6), st.integers(1, 6)))
def test_tiles_hold_every_token_once_and_are_compact(
    grid: tuple[int, int], tile: tuple[int, int]
) -> None:
    tiles = geometry.tiles(grid, tile, device=CPU)
    n = grid[0] * grid[1]
    real = tiles.order[tiles.weight > 0]
    assert sorted(real.tolist()) == list(range(n))
    torch.testing.assert_close(tiles.weight.sum(-1), torch.ones(tiles.count))
    for members, weight in zip(tiles.order, tiles.weight, strict=True):
        inside = members[weight > 0]
        rows, columns = inside // grid[1], inside % grid[1]
        if grid[0] > 1:
            assert rows.max() - rows.min() < tile[0]
            assert columns.max() - columns.min() < tile[1]
        assert len(inside) <= tile[0] * tile[1]


@settings(max_examples=40, deadline=None)
@given(grid=SIDES, tile=st.tuples(st.integers(1, 6), st.integers(1, 6)))
def test_gather_scatter_mean_and_spread(grid: tuple[int, int], tile: tuple[int, int]) -> None:
    tiles = geometry.tiles(grid, tile, device=CPU)
    x = torch.randn(2, grid[0] * grid[1], 3)
    assert torch.equal(tiles.scatter(tiles.gather(x)), x)
    home = {int(t): i for i, row in enumerate(tiles.order) for t in row}
    mean = torch.stack(
        [x[:, [t for t in home if home[t] == i]].mean(1) for i in range(tiles.count)], 1
    )
    torch.testing.assert_close(tiles.mean(x), mean)
    for token, tile_index in home.items():
        torch.testing.assert_close(tiles.spread(mean)[:, token], mean[:, tile_index])


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 600), aspect=st.floats(0.2, 5.0))
def test_infer_grid_is_the_nearest_factor_pair(n: int, aspect: float) -> None:
    rows, columns = geometry.infer_grid(n, aspect)
    assert rows * columns == n
    best = min(abs(math.log(r / (n / r) / aspect)) for r in range(1, n + 1) if n % r == 0)
    assert abs(math.log(rows / columns / aspect)) == pytest.approx(best, abs=1e-9)


@settings(max_examples=30, deadline=None)
@given(grid=SIDES, parts=st.tuples(st.integers(1, 5), st.integers(1, 5)))
def test_pooling_is_adaptive_average_pooling_where_cells_divide(
    grid: tuple[int, int], parts: tuple[int, int]
) -> None:
    grid = (grid[0] * parts[0], grid[1] * parts[1])
    x = torch.randn(1, 2, *grid)
    pooled = x.flatten(2) @ geometry.pooling(grid, parts, device=CPU)
    expected = F.adaptive_avg_pool2d(x, parts).flatten(2)
    torch.testing.assert_close(pooled, expected)


@settings(max_examples=30, deadline=None)
@given(grid=SIDES, parts=st.tuples(st.integers(1, 5), st.integers(1, 5)))
def test_interpolation_is_torchs_bilinear(grid: tuple[int, int], parts: tuple[int, int]) -> None:
    parts = (min(parts[0], grid[0]), min(parts[1], grid[1]))
    x = torch.randn(1, 2, *parts)
    back = x.flatten(2) @ geometry.interpolation(grid, parts, device=CPU).mT
    expected = F.interpolate(x, grid, mode="bilinear", align_corners=False).flatten(2)
    torch.testing.assert_close(back, expected, rtol=1e-4, atol=1e-5)


def test_tables_are_kept_and_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(geometry, "_TABLES", {})
    monkeypatch.setattr(geometry, "_MOST_ELEMENTS", 60)
    first = geometry.table(geometry.positions, (2, 3), device=CPU)
    assert geometry.table(geometry.positions, (2, 3), device=CPU) is first
    for rows in range(1, 9):
        geometry.table(geometry.positions, (rows, 3), device=CPU)
    kept = sum(table.numel() for table in geometry._TABLES.values())
    assert 0 < kept <= 60


def test_fake_tensors_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    monkeypatch.setattr(geometry, "_TABLES", {})
    with FakeTensorMode():
        geometry.table(geometry.positions, (2, 3), device=CPU)
    assert type(geometry.table(geometry.positions, (2, 3), device=CPU)) is torch.Tensor


class TestOnAGpu:
    """What the cache asks of CUDA, answered by hand."""

    @pytest.fixture(autouse=True)
    def _empty(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(geometry, "_TABLES", {})
        monkeypatch.setattr(geometry, "_CAPTURED", {})
        monkeypatch.setattr(geometry, "_MOST_ELEMENTS", 60)
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        self.capturing, self.waits = False, 0
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)
        monkeypatch.setattr(torch.cuda, "current_stream", self.stream)

    def stream(self, device: torch.device) -> SimpleNamespace:
        return SimpleNamespace(synchronize=self.wait)

    def wait(self) -> None:
        assert not geometry._TABLES, "published before its values were there"
        self.waits += 1

    def test_a_table_is_published_when_its_values_are_there(self) -> None:
        """Another thread may read it on another stream."""
        first = geometry.table(numbers, 20, device=CUDA)
        assert self.waits == 1
        assert geometry.table(numbers, 20, device=CUDA) is first
        assert self.waits == 1, "only once"
        geometry.table(torch.arange, 20, device=CPU)
        assert self.waits == 1

    def test_what_a_graph_read_stays_where_it_is(self) -> None:
        held = geometry.table(numbers, 40, device=CUDA)
        self.capturing = True
        assert geometry.table(numbers, 40, device=CUDA) is held
        self.capturing = False
        for n in range(50, 55):  # each evicts the one before
            geometry.table(torch.arange, n, device=CPU)
        assert geometry.table(numbers, 40, device=CUDA) is held
        self.capturing = True
        assert geometry.table(numbers, 40, device=CUDA) is held, "by a second graph, too"

    def test_a_table_that_a_graph_builds_is_its_own(self) -> None:
        """Its values are there only after a replay."""
        self.capturing = True
        inside = geometry.table(numbers, 20, device=CUDA)
        self.capturing = False
        outside = geometry.table(numbers, 20, device=CUDA)
        assert outside is not inside
        assert torch.equal(outside, torch.arange(20))


def numbers(n: int, *, device: torch.device) -> torch.Tensor:
    """On a CPU, whatever the device."""
    return torch.arange(n)
