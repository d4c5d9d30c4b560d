"""Methods whose pattern is the same for every image, against loops over pairs of patches."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from sparsiattn import InvalidOption, InvalidType, Pattern, Site, Strategy, patch
from sparsiattn.methods.atrous import Atrous
from sparsiattn.methods.bigbird import BigBird, draw
from sparsiattn.methods.fibottention import Fibottention, banded, offsets
from sparsiattn.methods.longformer import Longformer
from sparsiattn.methods.lowrank import LowRank
from sparsiattn.methods.sd_filter import SDFilter
from sparsiattn.strategies import Hybrid, TokenDrop, TokenMerge
from sparsiattn.testing import StrategySuite, random_inputs, tiny_images, tiny_vit

CPU = torch.device("cpu")


def mask_of(strategy: Strategy, grid: tuple[int, int], **options) -> torch.Tensor:
    """What a strategy plans for patches among themselves, ``[H, n, n]``."""
    inputs = random_inputs(grid, heads=3, dim=8, **options)
    pattern = strategy.planner(inputs.site)(inputs)
    assert isinstance(pattern, Pattern)
    mask = pattern.to_mask()[0, :, inputs.prefix :, inputs.prefix :]
    return mask.expand(3, -1, -1)


class TestFibottention(StrategySuite):
    strategy = Fibottention()


@pytest.mark.slow
class TestFibottentionModified(StrategySuite):
    strategy = Fibottention(modified=True, shuffle=False)


TWELVE = [
    *([1, 2, 3, 5], [4, 7], [6, 10], [9, 15], [12, 20], [14, 23]),
    *([17, 28], [19, 31], [22, 36], [25, 41], [27, 44], [30, 49]),
]
SIX = [
    *([1, 2, 3, 5], [4, 7, 11], [6, 10, 16, 26]),
    *([9, 15, 24, 39], [12, 20, 32, 52], [14, 23, 37, 60]),
]


@pytest.mark.parametrize("expected", [TWELVE, SIX])
def test_fibottention_offsets(expected):
    assert [list(found) for found in offsets(len(expected), 196)] == expected


@pytest.mark.parametrize(
    ("heads", "modified", "patches_only", "with_cls"),
    [
        (12, False, 1.99, 2.99),
        (12, True, 3.83, 4.80),
        (6, False, 3.54, 4.52),
        (6, True, 5.29, 6.25),
    ],
)
def test_fibottention_density(heads, modified, patches_only, with_cls):
    kept = banded(offsets(heads, 196, modified=modified), 196, device=CPU).float().mean().item()
    assert round(100 * kept, 2) == patches_only
    assert round(100 * (kept * 196**2 + 2 * 196 + 1) / 197**2, 2) == with_cls


@pytest.mark.parametrize(("heads", "patches"), [(1, 196), (12, 49), (16, 4), (3, 1)])
def test_fibottention_at_the_edges(heads, patches):
    """One head has the widest window, and a head without an offset in reach keeps 1."""
    found = offsets(heads, patches)
    assert len(found) == heads
    assert all(found)
    assert heads > 1 or found[0][-1] == 55  # 1, 2, 3, 5, ... within 65


@pytest.mark.parametrize("prefix", [0, 1])
def test_fibottention_mask(prefix):
    """Without CLS every patch sees itself too; the grid is not square."""
    mask = mask_of(Fibottention(shuffle=False), (3, 5), prefix=prefix)
    for head, known in enumerate(offsets(3, 15)):
        for j in range(15):
            for k in range(15):
                wanted = abs(j - k) in known or (j == k and not prefix)
                assert mask[head, j, k] == wanted


def test_fibottention_shuffles_heads_by_layer():
    x = torch.zeros(1, 6, 197, 8)
    sites = [Site.of(x, x, x, prefix_tokens=1, index=i) for i in (0, 1, 1)]
    orders = [Fibottention().planner(site).options[1] for site in sites]
    assert orders[0] != orders[1] == orders[2]
    assert sorted(orders[0]) == list(range(6))


def test_fibottention_windows_in_order():
    with pytest.raises(InvalidOption, match="w_max"):
        Fibottention(w_min=8, w_max=4)


class TestLongformer(StrategySuite):
    strategy = Longformer(window=3)


@pytest.mark.slow
class TestLongformerGlobal(StrategySuite):
    strategy = Longformer(window=3, dilation=2, global_patches=2)


class TestBigBird(StrategySuite):
    strategy = BigBird(random=2)


class TestAtrous(StrategySuite):
    strategy = Atrous(window=2)


@pytest.mark.slow
class TestAtrousFused(StrategySuite):
    strategy = Atrous(window=2, dilations=[1, 2], fuse=True)


@pytest.mark.parametrize("prefix", [0, 5])
@pytest.mark.parametrize(("window", "dilation"), [(1, 1), (3, 1), (3, 2), (5, 1)])
def test_longformer_mask(window, dilation, prefix):
    _check_longformer_mask(window, dilation, prefix)


def test_windows_and_steps_far_beyond_the_grid():
    most = 2**31 - 1
    _check_longformer_mask(most, 1, 1)
    _check_longformer_mask(3, most, 1)
    far = Atrous(window=most, dilations=(most,), fuse=True)
    assert torch.equal(mask_of(far, (3, 5), prefix=0)[0], torch.eye(15, dtype=torch.bool))


@pytest.mark.parametrize(
    "make",
    [
        partial(Longformer, dilation=2**31),
        partial(Longformer, window=2**31 + 1),
        partial(Atrous, window=10**20),
        partial(Atrous, dilations=(10**20,)),
        partial(Fibottention, w_max=10**20),
        partial(LowRank, guide=10**20),
        partial(SDFilter, width=10**20),
    ],
)
def test_options_beyond_what_can_be_counted_are_refused(make):
    with pytest.raises(InvalidOption, match=r"2147483647|below"):
        make()


def _check_longformer_mask(window, dilation, prefix):
    mask = mask_of(Longformer(window=window, dilation=dilation), (3, 5), prefix=prefix)
    reach = min(window // 2, 5)
    steps = [s * dilation for s in range(-reach, reach + 1)]
    for j, k in pairs(3, 5):
        wanted = j[0] - k[0] in steps and j[1] - k[1] in steps
        assert mask[:, j[0] * 5 + j[1], k[0] * 5 + k[1]].tolist() == [wanted] * 3


@pytest.mark.parametrize(
    ("side", "found"), [(1, [(2, 3)]), (2, [(1, 1), (1, 4), (3, 1), (3, 4)]), (9, None)]
)
def test_global_patches(side, found):
    """In the middle of equal cells, on a 4 x 6 grid; they see all and all see them."""
    mask = mask_of(Longformer(window=1, global_patches=side), (4, 6), prefix=0)[0]
    known = [r * 6 + c for r, c in found] if found else list(range(24))
    for j in range(24):
        for k in range(24):
            assert mask[j, k] == (j == k or j in known or k in known)


@pytest.mark.parametrize("prefix", [0, 1])
def test_bigbird_mask(prefix):
    """The window, and as many random keys as asked for, not the same in every head or query."""
    strategy = BigBird(random=4)
    mask = mask_of(strategy, (4, 6), prefix=prefix)
    inputs = random_inputs((4, 6), prefix=prefix)
    lists = draw(strategy.planner(inputs.site).key, 3, 24, 4, device=CPU)
    assert all(len(set(found)) == 4 for found in lists.flatten(0, 1).tolist())
    for head in range(3):
        for j, k in pairs(4, 6):
            at, to = j[0] * 6 + j[1], k[0] * 6 + k[1]
            near = abs(j[0] - k[0]) <= 1 and abs(j[1] - k[1]) <= 1
            assert mask[head, at, to] == (near or to in lists[head, at].tolist())


def test_bigbird_draws_every_key_alike():
    """4,000 draws of 3 of 10 keys: each comes 1,200 times, give or take 4 standard deviations."""
    counts = draw(7, 400, 10, 3, device=CPU).flatten().bincount(minlength=10)
    assert (counts - 1200).abs().max() < 4 * (4000 * 0.3 * 0.7) ** 0.5


def test_bigbird_draws_by_seed_site_and_head():
    state = torch.get_rng_state()
    first, again, other = (draw(key, 2, 50, 3, device=CPU) for key in (1, 1, 2))
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first[0], first[1])
    x = torch.zeros(1, 3, 17, 8)
    sites = [Site.of(x, x, x, prefix_tokens=1, name=name) for name in ("a", "b")]
    keys = {BigBird(seed=seed).planner(site).key for seed in (0, 1) for site in sites}
    assert len(keys) == 4


@pytest.mark.parametrize("grid", [(4, 4), (3, 5), (7, 8)])
@pytest.mark.parametrize("fuse", [False, True])
def test_atrous_mask(grid, fuse):
    """Sub-grid by sub-grid, cut into windows; border windows are smaller."""
    strategy = Atrous(window=2, dilations=[1, 2, 3], fuse=fuse)
    mask = mask_of(strategy, grid, prefix=1)
    branches = []
    for rate in (1, 2, 3):
        keep = torch.zeros(grid[0] * grid[1], grid[0] * grid[1], dtype=torch.bool)
        for members in interleaved(grid, rate, 2):
            keep[torch.tensor(members)[:, None], torch.tensor(members)] = True
        branches.append(keep)
    wanted = torch.stack(branches)
    assert torch.equal(mask, wanted.any(0).expand(3, -1, -1) if fuse else wanted)


def interleaved(grid, rate, window):
    """The patches of every window of every sub-grid, by slices of the image."""
    image = torch.arange(grid[0] * grid[1]).view(grid)
    for top in range(min(rate, grid[0])):
        for left in range(min(rate, grid[1])):
            sub = image[top::rate, left::rate]
            for rows in sub.split(window, 0):
                yield from (part.flatten().tolist() for part in rows.split(window, 1))


def pairs(rows, columns):
    patches = [(r, c) for r in range(rows) for c in range(columns)]
    return [(j, k) for j in patches for k in patches]


def test_atrous_shares_heads_evenly():
    x = torch.zeros(1, 6, 17, 8)
    site = Site.of(x, x, x, prefix_tokens=1)
    assert Atrous().planner(site).options[1] == (1, 1, 1, 2, 2, 2)
    with pytest.raises(InvalidOption, match=r"6 heads.*fuse=True"):
        Atrous(dilations=[1, 2, 3, 4, 5, 6, 7]).planner(site)


@pytest.mark.parametrize(
    "full",
    [
        Longformer(window=17),
        Longformer(window=1, global_patches=8),
        BigBird(window=1, random=64),
        Atrous(window=8, dilations=(1,)),
        Atrous(window=8, dilations=(2, 1), fuse=True),
    ],
    ids=lambda full: f"{full.name}",
)
def test_options_that_reach_every_key_are_the_dense_model(full):
    model, x = tiny_vit(), tiny_images()
    with torch.no_grad():
        dense = model(x)
        with patch(model, full):
            torch.testing.assert_close(model(x), dense, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("build", "error", "words"),
    [
        (lambda: Longformer(window=4), InvalidOption, "odd.*5"),
        (lambda: Longformer(dilation=0), InvalidOption, "dilation.*>= 1"),
        (lambda: BigBird(random=-1), InvalidOption, "random.*>= 0"),
        (lambda: BigBird(random=True), InvalidType, "random.*True"),
        (lambda: Atrous(dilations=[]), InvalidOption, "at least one"),
        (lambda: Atrous(dilations=[0]), InvalidOption, ">= 1, got 0"),
        (lambda: Atrous(fuse=1), InvalidType, "fuse"),
        (lambda: Fibottention(w_max=0), InvalidOption, "w_max"),
    ],
)
def test_wrong_options_say_what_is_right(build, error, words):
    with pytest.raises(error, match=words):
        build()


@pytest.mark.parametrize("tokens", [TokenDrop(keep=0.5, layers=[0]), TokenMerge(r=16, layers=[0])])
def test_tokens_that_are_left_stand_for_their_patch(tokens):
    """After tokens were dropped, those left keep the pairs that their patches had."""
    model, x = tiny_vit(), tiny_images()
    seen = []
    strategy = Hybrid(attention=Longformer(window=3), tokens=tokens)
    with torch.no_grad(), patch(model, strategy) as live:
        handle = live.observing(lambda site, planner, inputs: seen.append((planner, inputs)))
        with handle:
            model(x)
        planner, inputs = seen[-1]
        mask = planner(inputs).to_mask()
    assert inputs.token_state.reduced
    assert mask.shape == (3, 1, inputs.n_queries, inputs.n_keys)
    assert mask.diagonal(dim1=-2, dim2=-1)[..., 1:].all()  # the core does prefix rows
    if tokens.name == "token_merge":  # merged tokens lie between patches
        return
    for image, ids in enumerate(inputs.token_state.ids):
        single = (ids >= 0).nonzero().flatten()  # a fused one is written below zero
        assert len(single) >= 31
        row, column = ids[single] // 8, ids[single] % 8
        near = ((row[:, None] - row).abs() <= 1) & ((column[:, None] - column).abs() <= 1)
        assert torch.equal(mask[image, 0, 1:, 1:][single][:, single], near)


def test_queries_on_a_coarser_grid_stand_for_the_key_under_them():
    """2 x 2 queries over 4 x 4 keys: each sees the window around the key under its middle."""
    inputs = random_inputs((4, 4), prefix=0)
    pooled = inputs.replace(q=inputs.q[..., :4, :], query_grid=(2, 2), key_grid=(4, 4))
    mask = Longformer(window=3).plan(pooled).to_mask()[0, 0].view(4, 4, 4)
    for query, (row, column) in enumerate([(1, 1), (1, 3), (3, 1), (3, 3)]):
        wanted = torch.zeros(4, 4, dtype=torch.bool)
        wanted[row - 1 : row + 2, column - 1 : column + 2] = True
        assert torch.equal(mask[query], wanted)


def test_masks_are_made_once():
    inputs = random_inputs((4, 4), prefix=0)
    first, again = (inputs.table(banded, ((1, 2),), 16) for _ in range(2))
    assert first is again
