"""Tiles of queries, blocks of keys, and the order of tokens that are left."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models import VisionTransformer

import sparsiattn
from sparsiattn.attention import KeyBlocks, Pattern, Ranked, geometry
from sparsiattn.attention.token_state import ReductionStep, TokenState
from sparsiattn.strategies import Connectivity, Local, finish, reduction
from sparsiattn.testing import random_inputs

CPU = torch.device("cpu")


@settings(max_examples=60, deadline=None)
@given(
    grid=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    tile=st.tuples(st.integers(1, 4), st.integers(1, 4)),
)
def test_tiles_hold_every_token_once(grid: tuple[int, int], tile: tuple[int, int]) -> None:
    tiles = geometry.tiles(grid, tile, device=CPU)
    n = grid[0] * grid[1]
    real = tiles.order[tiles.weight > 0]
    assert sorted(real.tolist()) == list(range(n))
    sizes = (tiles.weight > 0).sum(-1)
    assert tiles.smallest <= int(sizes.min())
    assert tiles.even == (int(sizes.min()) == tiles.size)
    x = torch.randn(2, 3, n, 4)
    mean = torch.stack([x[:, :, row[w > 0]].mean(2) for row, w in zip(tiles.order, tiles.weight,
                        strict=True)], dim=2)  # fmt: skip
    torch.testing.assert_close(tiles.mean(x), mean)
    torch.testing.assert_close(tiles.scatter(tiles.gather(x)), x)
    if tiles.even:
        torch.testing.assert_close(tiles.view(x).reshape(tiles.gather(x).shape), tiles.gather(x))


@settings(max_examples=60, deadline=None)
@given(
    grid=st.tuples(st.integers(1, 6), st.integers(2, 7)),
    prefix=st.integers(0, 3),
    k=st.integers(1, 40),
    data=st.data(),
)
def test_block_lists_keep_the_budget(
    grid: tuple[int, int], prefix: int, k: int, data: st.DataObject
) -> None:
    """Exactly k keys, prefix ones among them; whole blocks but for the last, in order of score."""
    inputs = random_inputs(grid, prefix=prefix, tile=(2, 2), block=(2, 2), heads=1, batch=1)
    blocks = inputs.blocks
    assert blocks is not None
    seed = data.draw(st.integers(0, 99))
    rows = inputs.tiles.count if inputs.tiles else 0
    scores = torch.rand(1, 1, rows, blocks.count, generator=torch.Generator().manual_seed(seed))
    pattern = finish(Pattern.top(scores, k), inputs)
    if not isinstance(pattern, KeyBlocks):
        assert k >= inputs.n_keys or k <= prefix
        return
    for row in range(rows):
        wanted = list(range(prefix))
        for block in scores[0, 0, row].argsort(descending=True).tolist():
            real = blocks.order[block][blocks.weight[block] > 0] + prefix
            wanted += real.tolist()
        assert pattern.index[0, 0, row].tolist() == wanted[:k]
    assert pattern.pairs() == inputs.prefix * inputs.n_keys + (inputs.n_queries - prefix) * k


def test_scores_of_keys_are_averaged_over_blocks() -> None:
    inputs = random_inputs((4, 6), tile=(2, 3), block=(2, 2))
    n, blocks = inputs.n_keys, inputs.blocks
    assert blocks is not None
    scores = torch.rand(2, 3, n, n)
    by_key = finish(Pattern.top(scores, 9), inputs)
    rows = inputs.tiles.mean(scores[..., 1:, :])  # type: ignore[union-attr]
    means = torch.stack([rows[..., 1 + order].mean(-1) for order in blocks.order], dim=-1)
    by_block = finish(Pattern.top(means, 9), inputs)
    assert isinstance(by_key, KeyBlocks)
    assert torch.equal(by_key.to_mask(), by_block.to_mask())


@pytest.mark.parametrize("channels", [None, 4])
@pytest.mark.parametrize(
    ("mean_query_boost", "self_weight"), [(False, None), (True, None), (True, 0.3)]
)
def test_planning_in_blocks_follows_the_formula(
    mean_query_boost: bool, self_weight: float | None, channels: int | None
) -> None:
    """softmax(q (down^T k)^T) |up|^T over blocks, times the mean of exp(logit above low resolution)
    of the mean query, one block at a time; and to a tile's own blocks a share of the sum."""
    inputs = random_inputs((8, 8), tile=(4, 4), block=(2, 2), dim=8)
    strategy = Connectivity(
        k=20,
        tile=(4, 4),
        block=(2, 2),
        channels=channels,
        mean_query_boost=mean_query_boost,
        self_weight=self_weight,
    )
    planner = strategy.planner(inputs.site)
    with torch.no_grad():
        planner.down.add_(0.05 * torch.randn_like(planner.down))
        planner.up.add_(0.05 * torch.randn_like(planner.up))
        found = planner.scores(inputs)
    tiles, blocks = inputs.tiles, inputs.blocks
    assert tiles is not None
    assert blocks is not None
    patches = inputs.k[..., 1:, :]
    means = torch.stack([patches[:, :, order].mean(2) for order in blocks.order], dim=2)
    units = torch.cat([inputs.k[..., :1, :], means], dim=2)
    rows = torch.stack([inputs.q[:, :, 1 + order].mean(2) for order in tiles.order], dim=2)
    q, k = rows, units
    if planner.project_q is not None and planner.project_k is not None:
        q, k = planner.project_q(rows), planner.project_k(units)
    share = (q @ (planner.down.mT @ k).mT * inputs.scale).softmax(-1)
    wanted = share @ planner.up[1:].abs().mT
    if mean_query_boost:
        mean = rows.mean(2, keepdim=True)
        low = mean @ units.mT @ planner.down @ planner.up.mT * inputs.scale
        logits = mean @ patches.mT * inputs.scale
        above = [(logits[..., order] - low[..., [1 + i]]).exp().mean(-1)
                 for i, order in enumerate(blocks.order)]  # fmt: skip
        wanted = wanted * torch.stack(above, dim=-1)
    if self_weight is not None:
        inside = [[set(b.tolist()) <= set(t.tolist()) for b in blocks.order] for t in tiles.order]
        wanted = (
            wanted + self_weight * wanted.sum(-1, keepdim=True) * torch.tensor(inside).float() / 4
        )
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def test_nested_order_is_compact() -> None:
    rank = geometry.nested_rank((32, 32), (8, 8), (4, 4), device=CPU)
    assert sorted(rank.tolist()) == list(range(1024))
    order = rank.argsort()
    for run, side in ((64, 8), (16, 4)):
        pieces = order.view(-1, run)
        rows, columns = pieces // 32, pieces % 32
        assert (rows.amax(1) - rows.amin(1) < side).all()
        assert (columns.amax(1) - columns.amin(1) < side).all()


def test_what_is_left_stands_tile_by_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    model = VisionTransformer(img_size=32, patch_size=1, embed_dim=12, depth=2, num_heads=2,
                              num_classes=3).eval()  # fmt: skip
    x, seen = torch.randn(2, 3, 32, 32), []
    with torch.no_grad(), sparsiattn.patch(model, "token_drop", keep=0.3, layers=[0]) as live:
        compact = model(x)
        with live.observing(lambda site, planner, inputs: seen.append(inputs.token_state)):
            model(x)
        source = live.source()
        monkeypatch.setattr(reduction, "TILE_FROM", 10**9)
        raster = model(x)
        assert not torch.equal(live.source(), source)
    torch.testing.assert_close(compact, raster)
    rank = geometry.nested_rank((32, 32), (8, 8), (4, 4), device=CPU)
    places = rank[seen[-1].ids]
    assert (places.diff(dim=1) > 0).all()


def test_blocks_by_default_grow_with_the_budget() -> None:
    strategy = Connectivity(k=0.1)
    assert [strategy.block_for(n) for n in (197, 1025, 4097)] == [1, (2, 2), (4, 4)]
    assert Connectivity(k=0.1, prefix_keys=False).block_for(4097) == 1
    assert Connectivity(k=0.1, block=1).block_for(4097) == 1
    assert Connectivity(k=8).block_for(4097) == 1
    with pytest.raises(sparsiattn.InvalidOption, match="block must be 1"):
        Connectivity(block=(4,))  # type: ignore[arg-type]


@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("block", [1, (2, 2)])
@pytest.mark.parametrize("tile", [1, (2, 2), (3, 2)])
@pytest.mark.parametrize("grid", [(8, 8), (5, 7)])
def test_local_takes_the_nearest_keys_and_of_equally_near_ones_the_first(
    grid: tuple[int, int], tile: geometry.Tile, block: geometry.Tile, prefix: int
) -> None:
    """Near to all queries of a tile; no two keys have one score, so all devices keep the same."""
    block = block if tile != 1 else 1
    inputs = random_inputs(grid, tile=tile, block=block, prefix=prefix)
    wish = Local(k=9).plan(inputs)
    assert isinstance(wish, Ranked)
    places = torch.cartesian_prod(torch.arange(grid[0]), torch.arange(grid[1])).double()
    distance = (places[:, None] - places).square().sum(-1)
    if inputs.tiles is not None:
        distance = inputs.tiles.mean(distance)
    if inputs.blocks is not None:
        distance = inputs.blocks.mean(distance.mT).mT
    # a constant of each row, so ties are the same; rounding errors must not break them
    distance = ((distance - distance.amin(-1, keepdim=True)) * 4096).round()
    order = distance.sort(dim=-1, stable=True).indices
    found = wish.scores[0, 0].sort(dim=-1, descending=True).indices
    first = prefix if inputs.blocks is None else 0
    assert torch.equal(
        found, torch.cat([order + first, torch.arange(first).expand(len(order), -1)], 1)
    )
    assert (wish.scores.sort(dim=-1).values.diff(dim=-1) > 0).all()


@pytest.mark.parametrize("prefix", [0, 2])
def test_so_it_does_once_tokens_were_dropped(prefix: int) -> None:
    """On what remains of an 8 x 8 grid: every third patch is gone."""
    kept = torch.tensor([i for i in range(64) if i % 3]).expand(2, -1)
    state = TokenState(1, prefix, (8, 8)).advance(ReductionStep(kept, None, 64))
    inputs = random_inputs((1, kept.shape[1]), prefix=prefix).replace(token_state=state)
    wish = Local(k=9).plan(inputs)
    assert isinstance(wish, Ranked)
    places = torch.cartesian_prod(torch.arange(8), torch.arange(8)).double()[kept[0]]
    order = (places[:, None] - places).square().sum(-1).sort(dim=-1, stable=True).indices
    found = wish.scores[1, 0].sort(dim=-1, descending=True).indices
    assert torch.equal(found[:, : order.shape[1]], order + prefix)
    assert (wish.scores[..., prefix:].sort(dim=-1).values.diff(dim=-1) > 0).all()


def test_a_compiled_model_keeps_the_same_nearest_keys() -> None:
    inputs = random_inputs((9, 6), tile=(3, 2), block=(2, 2))

    def kept(x: torch.Tensor) -> torch.Tensor:
        pattern = finish(Local(k=20).plan(inputs.replace(q=x)), inputs)
        return pattern.to_mask()

    compiled = torch.compile(kept, backend="eager")(inputs.q)
    assert torch.equal(compiled, kept(inputs.q))


def test_local_makes_no_table_of_all_pairs() -> None:
    inputs = random_inputs((64, 64), heads=1, batch=1, tile=(8, 8))
    wish = Local(k=0.1).plan(inputs)
    assert isinstance(wish, Ranked)
    assert wish.scores.numel() == 64 * 4097
