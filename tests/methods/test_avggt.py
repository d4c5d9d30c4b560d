"""`avggt`: the layers of many views, against masks made with plain loops."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import sparsiattn
from sparsiattn.attention.structure import Structure
from sparsiattn.methods.avggt import AVGGT
from sparsiattn.strategies import finish
from sparsiattn.testing import StrategySuite
from tests.support.across_views import AcrossViews


class TestAVGGT(StrategySuite):
    strategy = AVGGT(stride=2)


CASES = [
    # rows, columns, views, prefix, specials, suffix, stride
    ((4, 6), 3, 0, (0,), 0, 2),
    ((5, 7), 2, 1, (0, 1), 1, 3),
    ((6, 6), 1, 1, (), 0, 4),
    ((3, 2), 4, 0, (), 0, 4),
]


def site_of(grid: tuple[int, int], views: int, *ends: Any) -> tuple[Structure, Any, Tensor]:
    prefix, specials, suffix = ends
    structure = Structure(grid, views, prefix, suffix, specials, source="the test")
    x = torch.randn(3, 1, 2, structure.tokens, 8, generator=torch.Generator().manual_seed(0))
    return structure, sparsiattn.Site.of(*x).described(structure), x


def by_loops(structure: Structure, stride: int | None) -> list[set[int]]:
    """The keys of every patch in canonical order (special tokens first), as the docs say.

    Only the keys that must be there: in their tile or list others may be kept.
    """
    rows, columns = structure.grid
    n, inside, count = rows * columns, len(structure.specials), structure.special_count
    before, after = structure.prefix, structure.suffix
    keys: list[set[int]] = []
    for view in range(structure.views):
        for patch in range(n):
            if stride is None:
                mine = set(range(before)) | set(range(count - after, count))
                mine |= {before + view * inside + i for i in range(inside)}
                mine |= {count + view * n + i for i in range(n)}
            else:
                mine = set(range(count)) | {count + view * n + patch}
                for other in range(structure.views):
                    for row in range(min(stride, rows) // 2, rows, stride):
                        for column in range(min(stride, columns) // 2, columns, stride):
                            mine.add(count + other * n + row * columns + column)
            keys.append(mine)
    return keys


@pytest.mark.parametrize("tile", [1, (2, 2)])
@pytest.mark.parametrize(("grid", "views", "prefix", "specials", "suffix", "stride"), CASES)
def test_keys_are_those_of_loops(
    grid: tuple[int, int],
    views: int,
    prefix: int,
    specials: Any,
    suffix: int,
    stride: int,
    tile: Any,
) -> None:
    structure, site, x = site_of(grid, views, prefix, specials, suffix)
    inputs = sparsiattn.AttentionInputs(*x, 1.0, None, site, tile=tile)
    count = structure.special_count
    for first, step in ((1.0, None), (0.0, stride)):
        strategy = AVGGT(first=first, stride=stride)
        mask = finish(strategy.plan(inputs), inputs, background=None).to_mask()[0, 0]
        assert mask[:count].all()
        wanted = by_loops(structure, step)
        for patch, keys in enumerate(wanted):
            kept = set(mask[count + patch].nonzero().flatten().tolist())
            assert keys <= kept
            spare = 0 if step is None else (1 if tile == 1 else math.prod(tile))
            assert len(kept) <= len(keys) + spare
            if step is None:
                assert keys == kept


def test_early_layers_stay_within_each_view() -> None:
    """Changing one view changes the others only through layers over several views."""
    torch.manual_seed(0)
    model, images = AcrossViews(depth=6).eval(), torch.randn(1, 3, 3, 32, 48)
    changed = images.clone()
    changed[:, 2] += 1.0
    depths = []
    with torch.no_grad(), sparsiattn.patch(model, "avggt", first=1.0, input=images) as patch:
        across = [site for site in patch.sites if site.views == 3]
        depths = [model(x)[0] for x in (images, changed)]
    assert len(across) == 2
    with torch.no_grad():
        dense = [model(x)[0] for x in (images, changed)]
    # patches see other views through their special tokens only, which attend to all
    moved, moved_dense = ((a - b)[:, :2].abs().mean() for a, b in (depths, dense))
    assert 0 < moved < moved_dense


@pytest.mark.parametrize(("first", "within"), [(0.0, 0), (0.5, 1), (1.0, 2)])
def test_the_share_counts_layers_over_several_views(first: float, within: int) -> None:
    model, images = AcrossViews(depth=6).eval(), torch.randn(1, 3, 3, 32, 48)
    with sparsiattn.patch(model, "avggt", first=first, stride=2, input=images) as patch:
        roles = [(r.site.views, r.strategy.first, r.strategy.stride) for r in patch.runtimes]
    across = [role[1:] for role in roles if role[0] == 3]
    assert across == [(1.0, 2)] * within + [(0.0, 2)] * (2 - within)
    assert all(role[1:] == (0.0, 1) for role in roles if role[0] == 1)  # dense


def test_stride_one_is_the_dense_model() -> None:
    torch.manual_seed(0)
    model, images = AcrossViews().eval(), torch.randn(1, 3, 3, 32, 48)
    with torch.no_grad():
        dense = model(images)[0]
        with sparsiattn.patch(model, "avggt", first=0, stride=1, input=images):
            torch.testing.assert_close(model(images)[0], dense)
        with sparsiattn.patch(model, "avggt", first=0, stride=2, input=images):
            assert not torch.allclose(model(images)[0], dense, atol=1e-3)


@pytest.mark.parametrize(
    "options", [{"first": 1.5}, {"first": -0.1}, {"stride": 0}, {"stride": 2.5}]
)
def test_wrong_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises((sparsiattn.InvalidOption, sparsiattn.InvalidType), match=r"first|stride"):
        AVGGT(**options)
