"""Methods that choose keys by cheap scores: routing by regions, sign bits, a learned filter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import sparsiattn
from sparsiattn import AttentionInputs, InvalidOption, Pattern, Strategy
from sparsiattn.attention import KeyBlocks
from sparsiattn.methods.bilevel import BiLevel
from sparsiattn.methods.binary_topk import BinaryTopK, hamming
from sparsiattn.methods.sd_filter import SDFilter, received
from sparsiattn.strategies import finish
from sparsiattn.testing import (
    StrategySuite,
    random_inputs,
    tiny_images,
    tiny_vit,
    windowed_images,
    windowed_vit,
)


class TestBiLevel(StrategySuite):
    strategy = BiLevel(k=0.4, regions=4)


@pytest.mark.slow
class TestBiLevelByHead(StrategySuite):
    strategy = BiLevel(k=0.4, regions=(2, 4), shared=False, background=2)


class TestBinaryTopK(StrategySuite):
    strategy = BinaryTopK(k=0.3)


@pytest.mark.slow
class TestBinaryTopKPlain(StrategySuite):
    strategy = BinaryTopK(k=12, center=False, tile=(4, 4))


class TestSDFilter(StrategySuite):
    strategy = SDFilter(k=0.3)


@pytest.mark.slow
class TestSDFilterShared(StrategySuite):
    strategy = SDFilter(k=12, shared=True, background=2, tile=(4, 4))


def planned(strategy: Strategy, inputs: AttentionInputs, **options: Any) -> Pattern:
    """What the core makes of a strategy's plan at its site, tiles and blocks included."""
    one = strategy.resolve_for(inputs.site, 0, 1)
    inputs = inputs.replace(
        tile=one.tile_for(inputs.n_queries), block=one.block_for(inputs.n_keys), **options
    )
    return finish(one.planner(inputs.site)(inputs), inputs, prefix_keys=one.prefix_keys)


def full(mask: Tensor, inputs: AttentionInputs) -> Tensor:
    return mask.expand(*inputs.q.shape[:2], -1, -1)


# bilevel


def routed(inputs: AttentionInputs, region: tuple[int, int], topk: int, shared: bool) -> Tensor:
    """BiFormer's equations 3 to 6 as loops: which pairs survive, prefix rows and columns whole."""
    (rows, columns), p = inputs.query_grid, inputs.prefix
    regions: dict[tuple[int, int], list[int]] = {}
    for r in range(rows):
        for c in range(columns):
            at = (r // region[0], c // region[1])
            regions.setdefault(at, []).append(p + r * columns + c)
    batch, heads = inputs.q.shape[:2]
    keep = torch.zeros(batch, heads, inputs.n_queries, inputs.n_keys, dtype=torch.bool)
    keep[..., :p, :] = keep[..., :p] = True
    for b in range(batch):
        for h in range(heads):
            for members in regions.values():
                affinity = []
                for others in regions.values():
                    each = inputs.q[b][:, members].mean(1) * inputs.k[b][:, others].mean(1)
                    affinity.append(float(each.sum() if shared else each[h].sum()))
                best = sorted(zip(affinity, regions.values(), strict=True), reverse=True)[:topk]
                for query in members:
                    for _, others in best:
                        keep[b, h, query, others] = True
    return keep


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize(
    ("grid", "regions", "region"), [((4, 6), 2, (2, 3)), ((4, 8), (2, 4), (2, 2))]
)
def test_regions_are_routed_as_in_loops(
    grid: Any, regions: Any, region: Any, prefix: int, shared: bool
) -> None:
    inputs = random_inputs(grid, prefix=prefix)
    strategy = BiLevel(k=prefix + 2 * region[0] * region[1], regions=regions, shared=shared)
    expected = routed(inputs, region, 2, shared)
    pattern = planned(strategy, inputs)
    assert isinstance(pattern, KeyBlocks)
    assert torch.equal(full(pattern.to_mask(), inputs), expected)
    # key by key, as under a host's mask, the same keys are found
    every = torch.ones(1, 1, inputs.n_queries, inputs.n_keys, dtype=torch.bool)
    masked = inputs.replace(bias=every)
    assert torch.equal(full(planned(strategy, masked).to_mask(), inputs), expected)
    alone = finish(strategy.plan(inputs), inputs)  # no tiles: every query has its own list
    assert torch.equal(full(alone.to_mask(), inputs), expected)


def test_bilevel_at_deit_size_has_the_published_regions() -> None:
    """Section 3.2 for 14 x 14 patches and S = 7: 49 regions of four, 12 of them and the CLS."""
    inputs = random_inputs((14, 14), batch=1, heads=2)
    pattern = planned(BiLevel(k=49), inputs)
    assert isinstance(pattern, KeyBlocks)
    assert (pattern.blocks.count, pattern.blocks.size, pattern.chosen.shape[-1]) == (49, 4, 12)
    assert pattern.to_mask()[..., 1:, :].sum(-1).unique().tolist() == [49]
    assert planned(BiLevel(k=0.25), inputs).to_mask()[..., 1:, :].sum(-1).unique().tolist() == [50]


@pytest.mark.parametrize("grid", [(5, 7), (3, 3), (1, 13), (7, 1)])
def test_bilevel_takes_grids_that_regions_do_not_divide(grid: tuple[int, int]) -> None:
    inputs = random_inputs(grid, prefix=1)
    pattern = planned(BiLevel(k=0.5, regions=3), inputs)
    counts = full(pattern.to_mask(), inputs)[..., 1:, :].sum(-1)
    assert (counts == sparsiattn.count_of(0.5, inputs.n_keys)).all()


def test_padding_does_not_enter_a_regions_mean() -> None:
    inputs = random_inputs((4, 4), prefix=0, kind="mask")
    padding = torch.zeros(16, dtype=torch.bool)
    padding[[3, 7, 11, 15]] = True  # the last column
    loud = inputs.replace(
        q=inputs.q.masked_fill(padding[:, None], 50.0),
        k=inputs.k.masked_fill(padding[:, None], -50.0),
        bias=~padding.expand(1, 1, 16, 16),
    )
    quiet = inputs.replace(bias=~padding.expand(1, 1, 16, 16))
    strategy = BiLevel(k=4, regions=2)
    here, there = (full(planned(strategy, x).to_mask(), x)[..., ~padding, :] for x in (loud, quiet))
    assert torch.equal(here, there)


def test_bilevel_macs_are_those_of_section_18() -> None:
    """(S^2)^2 D per head to route: 16 regions of 2 x 2 patches, three heads of 16."""
    model, x = tiny_vit(), tiny_images(1)
    with torch.no_grad(), sparsiattn.patch(model, BiLevel(k=0.4, regions=4)) as live:
        model(x)
        rows = live.report().sites
    assert [row.predictor_macs for row in rows] == [16 * 16 * 16 * 3] * 2


# binary_topk


def test_hamming_is_the_popcount_of_differing_signs() -> None:
    q, k = (torch.randn(5, 16, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    for i in range(5):
        for j in range(5):
            bits = [sum(int(v >= 0) << d for d, v in enumerate(x)) for x in (q[i], k[j])]
            assert hamming(q, k)[i, j] == 16 - 2 * (bits[0] ^ bits[1]).bit_count()
    exact = hamming(q.bfloat16(), k.bfloat16())
    assert torch.equal(exact.float(), hamming(q.bfloat16().float(), k.bfloat16().float()))


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_binary_keys_are_those_of_a_loop(prefix: int, center: bool) -> None:
    inputs = random_inputs((3, 5), prefix=prefix)
    mask = full(planned(BinaryTopK(k=8, center=center), inputs).to_mask(), inputs)
    patches = range(prefix, inputs.n_keys)
    for b, h in ((0, 0), (1, 2)):
        keys = inputs.k[b, h]
        keys = keys - keys[prefix:].mean(0) if center else keys
        for i in patches:
            same = [int(((inputs.q[b, h, i] >= 0) == (keys[j] >= 0)).sum()) for j in patches]
            order = [(same[j - prefix], float(keys[j].norm()), j) for j in patches]
            best = {j for *_, j in sorted(order, reverse=True)[: 8 - prefix]}
            kept = {int(j) for j in mask[b, h, i].nonzero()}
            assert kept == best | set(range(prefix))


def test_binary_scores_find_more_mass_than_chance_and_less_than_the_oracle() -> None:
    inputs = random_inputs((8, 8), dim=32)
    exact = inputs.logits().softmax(-1)[..., 1:, :]

    def mass(name: str) -> float:
        strategy = BinaryTopK(k=0.2) if name == "binary_topk" else _named(name, k=0.2)
        return float((exact * planned(strategy, inputs).to_mask()[..., 1:, :]).sum(-1).mean())

    assert 2 * mass("random") < mass("binary_topk") < mass("topk")


def _named(name: str, **options: Any) -> Strategy:
    from sparsiattn.strategies import Random, TopK

    return {"random": Random, "topk": TopK}[name](**options)


def test_centring_ignores_what_all_keys_share() -> None:
    inputs = random_inputs((4, 4))
    moved = inputs.replace(k=inputs.k + 40.0)
    chosen = [full(planned(BinaryTopK(k=5), x).to_mask(), x) for x in (inputs, moved)]
    assert torch.equal(*chosen)
    blind = planned(BinaryTopK(k=5, center=False), moved).to_mask()
    assert not torch.equal(full(blind, moved), chosen[0])


def test_binary_scores_are_counted_as_the_matmul_that_runs() -> None:
    model, x = tiny_vit(), tiny_images(1)
    with torch.no_grad(), sparsiattn.patch(model, BinaryTopK(k=0.3)) as live:
        model(x)
        rows = live.report().sites
    assert [row.predictor_macs for row in rows] == [64 * 65 * 16 * 3] * 2


# sd_filter


@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_received_mass_is_that_of_a_loop(prefix: int) -> None:
    inputs = random_inputs((3, 4), prefix=prefix)
    for b, h in ((0, 0), (1, 2)):
        total = torch.zeros(inputs.n_keys)
        for query in inputs.q[b, h, prefix:]:
            weight = torch.tensor([float(query @ key) for key in inputs.k[b, h]]) * inputs.scale
            total += weight.exp() / weight.exp().sum()
        torch.testing.assert_close(received(inputs)[b, h], total / 12, rtol=1e-4, atol=1e-5)


def test_before_training_the_filter_keeps_what_the_mean_query_sees() -> None:
    inputs = random_inputs((3, 5), prefix=1)
    mask = full(planned(SDFilter(k=6), inputs).to_mask(), inputs)
    for b, h in ((0, 0), (1, 2)):
        mean = inputs.q[b, h, 1:].mean(0)
        order = sorted(range(1, 16), key=lambda j: -float(mean @ inputs.k[b, h, j]))
        expected = {0, *order[:5]}
        for i in range(1, 16):
            assert {int(j) for j in mask[b, h, i].nonzero()} == expected


def test_one_list_serves_all_queries_and_shared_ones_all_heads() -> None:
    inputs = random_inputs((4, 6))
    pattern = planned(SDFilter(k=6, shared=True), inputs)
    assert pattern.index.shape == (2, 1, 1, 6)  # type: ignore[attr-defined]
    assert planned(SDFilter(k=6), inputs).index.shape == (2, 3, 1, 6)  # type: ignore[attr-defined]


def test_shifted_windows_give_every_query_keys_it_may_see() -> None:
    model, x = windowed_vit(), windowed_images()
    with torch.no_grad(), sparsiattn.patch(model, SDFilter(k=2), input=x) as live:
        seen: list[bool] = []

        def check(site: Any, planner: Any, inputs: AttentionInputs) -> None:
            allowed = inputs.allowed()
            mask = finish(planner(inputs), inputs).to_mask()
            if allowed is not None:
                seen.append(bool((mask & allowed).any(-1).all()))

        with live.observing(check):
            model(x)
    assert seen
    assert all(seen)


def test_the_filter_learns_by_calibration() -> None:
    model, x = tiny_vit(), tiny_images(8)
    for block in model.blocks:  # type: ignore[union-attr]
        for made in block.attn.qkv.parameters():
            made.data[:96] *= 6  # queries and keys sharp enough that it matters which are kept

    def kept() -> float:
        shares: list[float] = []

        def watch(site: Any, planner: Any, inputs: AttentionInputs) -> None:
            mask = finish(planner(inputs), inputs).to_mask()[..., -1, :]
            shares.append(float((received(inputs) * mask).sum(-1).mean()))

        with torch.no_grad(), live.observing(watch):
            model(x)
        return sum(shares) / len(shares)

    with sparsiattn.patch(model, SDFilter(k=0.2)) as live:
        before = kept()
        losses = sparsiattn.calibrate(model, [x], steps=80)
        after = kept()
        assert losses[-1] < 0.4 * losses[0], losses[:: len(losses) - 1]
        assert after > before + 0.005, (before, after)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: BiLevel(regions=0), "regions must be"),
        (lambda: BiLevel(regions=(2, 0)), "regions must be"),
        (lambda: BiLevel(shared=1), "shared must be"),
        (lambda: BinaryTopK(center="keys"), "center must be"),
        (lambda: SDFilter(width=0), "width must be"),
        (lambda: SDFilter(shared=None), "shared must be"),
    ],
)
def test_wrong_options_are_refused_in_words(make: Any, words: str) -> None:
    with pytest.raises(InvalidOption, match=words):
        make()
