"""Clusterings of tokens: their suites, and plain loops written from the formulas."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import sparsiattn
from sparsiattn.methods.ailurus import AiluRus
from sparsiattn.methods.atc import ATC, LINKAGES, agglomerate, numbered
from sparsiattn.methods.clusters import Clustering, published_counts, squared_distances, to_nearest
from sparsiattn.methods.dpc_knn import DPCKNN, density_peaks
from sparsiattn.methods.expedit import Expedit
from sparsiattn.methods.kmedoids import KMedoids, weighted_medoids
from sparsiattn.strategies import TokenInputs
from sparsiattn.testing import TokenStrategySuite, random_inputs, tiny_images, tiny_vit
from tests.support import zoo
from tests.support.plain_vit import PlainViT
from tests.support.token_macs import check as check_macs
from tests.support.token_macs import deit
from tests.support.token_macs import tokens as counted


class _OnTwoBlocks(TokenStrategySuite):
    def model(self) -> nn.Module:
        return tiny_vit()


class TestATC(_OnTwoBlocks):
    strategy = ATC(keep=0.7)


@pytest.mark.slow
class TestKMedoids(_OnTwoBlocks):
    strategy = KMedoids(keep=0.6, layers=[0, 1])


@pytest.mark.slow
class TestDPCKNN(_OnTwoBlocks):
    strategy = DPCKNN(keep=[40, 0.5])


class TestAiluRus(_OnTwoBlocks):
    strategy = AiluRus(keep=0.5, detail=True, layers=[0, 1])

    def ordered(self) -> bool:
        return True  # of the image


@pytest.mark.slow
class TestExpedit(_OnTwoBlocks):
    strategy = Expedit(cells=(6, 5))
    identity: ClassVar = {"cells": (8, 8)}

    def ordered(self) -> bool:
        return True


ALL = [
    ATC(keep=0.6),
    ATC(r=9, linkage="single"),
    KMedoids(keep=0.6, layers=[0]),
    DPCKNN(keep=0.6, proportional=True),
    AiluRus(keep=0.5, layers=[0]),
    Expedit(layers=[0]),
]
IDS = ["atc", "atc-r", "kmedoids", "dpc_knn", "ailurus", "expedit"]


def token_inputs(x: Tensor, grid: tuple[int, int], **fields: Any) -> TokenInputs:
    site = random_inputs(grid).site
    return TokenInputs(x, site, None, 0, 1, grid=grid, **fields)


def partition(label: Any) -> set[frozenset[int]]:
    """Clusters as sets of their members, whatever their labels."""
    groups: dict[int, set[int]] = {}
    for i, one in enumerate(label):
        groups.setdefault(int(one), set()).add(i)
    return {frozenset(group) for group in groups.values()}


class TestAgglomeration:
    @pytest.mark.parametrize("linkage", LINKAGES)
    def test_partitions_are_those_of_scipy(self, linkage: str) -> None:
        hierarchy = pytest.importorskip("scipy.cluster.hierarchy")
        distance = pytest.importorskip("scipy.spatial.distance")
        for n in (2, 17, 40):
            f = torch.nn.functional.normalize(torch.randn(4, n, 6), dim=-1)
            distances = 1 - f @ f.mT
            trees = [
                hierarchy.linkage(distance.squareform(d.double().numpy(), checks=False), linkage)
                for d in distances
            ]
            for clusters in {1, max(1, n // 4), n // 2, n - 1}:
                found = agglomerate(distances, clusters, linkage)
                for label, tree in zip(found, trees, strict=True):
                    theirs = hierarchy.fcluster(tree, clusters, "maxclust")
                    assert partition(label) == partition(theirs)

    def test_ties_go_to_the_first_pair(self) -> None:
        points = torch.arange(6.0)
        distances = (points - points[:, None]).abs()[None]
        for linkage in LINKAGES:
            assert agglomerate(distances, 5, linkage).tolist() == [[0, 0, 2, 3, 4, 5]]
        # average: 01 and 23 and 45 merge before anything two apart
        assert agglomerate(distances, 3, "average").tolist() == [[0, 0, 2, 2, 4, 4]]

    def test_all_alike_and_not_a_number_still_make_so_many(self) -> None:
        for distances in (torch.zeros(2, 9, 9), torch.full((2, 9, 9), 4.0)):
            index, assign = numbered(agglomerate(distances, 4, "complete"), 4)
            assert [len(set(row)) for row in assign.tolist()] == [4, 4]
            assert index.eq(index.sort(1).values).all()
            assert index.max() < 9

    def test_the_operator_keeps_the_rules_of_torch(self) -> None:
        torch.library.opcheck(agglomerate, (torch.rand(2, 7, 7), 3, "average"))
        model, x = tiny_vit(), tiny_images()
        broken = x.clone()
        broken[1] = float("nan")
        with torch.no_grad(), sparsiattn.patch(model, ATC(keep=0.5)):
            torch.testing.assert_close(model(broken)[::2], model(x)[::2], rtol=1e-4, atol=1e-5)


def merged_by_scipy(linkage: str, keep: float, prefix: int = 1) -> Any:
    hierarchy = pytest.importorskip("scipy.cluster.hierarchy")
    distance = pytest.importorskip("scipy.spatial.distance")

    def reduce(index: int, x: Tensor, weights: Tensor, keys: Tensor, size: list[float]) -> Any:
        n = len(x) - prefix
        unit = keys[prefix:].double()
        unit = unit / unit.norm(dim=1, keepdim=True)
        condensed = distance.squareform((1 - unit @ unit.T).numpy(), checks=False)
        labels = hierarchy.fcluster(
            hierarchy.linkage(condensed, linkage), math.ceil(keep * n), "maxclust"
        )
        rows, sizes, place = [x[i] for i in range(prefix)], [1.0] * prefix, {}
        for number, group in enumerate(sorted(partition(labels), key=min)):
            total = sum(size[prefix + j] for j in group)
            rows.append(sum(size[prefix + j] * x[prefix + j] for j in group) / total)
            sizes.append(total)
            place.update(dict.fromkeys(group, number))
        return torch.stack(rows), sizes, place

    return reduce


@pytest.mark.parametrize(("linkage", "proportional"), [("average", True), ("complete", False)])
def test_atc_in_a_whole_model(linkage: str, proportional: bool) -> None:
    model: Any = tiny_vit()
    x = tiny_images(2)
    with torch.no_grad():
        strategy = ATC(keep=0.6, linkage=linkage, proportional=proportional, layers=[0, 1])
        with sparsiattn.patch(model, strategy) as live:
            found, source = model(x), live.source()
        plain = PlainViT(model, proportional)
        for i, image in enumerate(x):
            tokens, places, _ = plain.run(image, merged_by_scipy(linkage, 0.6))
            logits = model.head(model.fc_norm(model.norm(tokens[None]))[:, 0])
            torch.testing.assert_close(found[i : i + 1], logits, rtol=1e-4, atol=1e-4)
            assert (source[i, 1:] - 1).tolist() == places


def test_published_counts_and_macs_of_atc_on_deit_s() -> None:
    keep = published_counts(196, 0.7, 3)
    assert keep == [137, 96, 67]
    assert [published_counts(196, r, 3)[-1] + 1 for r in (0.9, 0.5, 0.25)] == [143, 25, 4]
    counts = dict(zip((3, 6, 9), keep, strict=True))
    with sparsiattn.patch(deit("small"), ATC(keep=keep)) as live:
        report = live.report()
    macs = check_macs("small", counted(lambda i, n: counts.get(i, n)), report)
    assert macs / 1e9 == pytest.approx(2.98, abs=0.0051)
    # one matrix of cosines at each of the layers
    assert report.predictor_macs == 64 * (196**2 + 137**2 + 96**2)


def distances_by_hand(x: Tensor) -> list[list[float]]:
    return [[float((a - b).double().norm()) for b in x] for a in x]


def peaks_by_hand(d: list[list[float]], count: int, k: int) -> list[int]:
    """TCFormer, section 3.2: rho, delta, and the largest of their products."""
    n = range(len(d))
    rho = [math.exp(-sum(v * v for v in sorted(d[i])[:k]) / k) for i in n]
    most = max(v for row in d for v in row if v < math.inf)
    delta = [
        min([most] + [d[i][j] for j in n if (rho[j], -j) > (rho[i], -i)]) for i in n
    ]  # of equals, the first is the denser
    return sorted(sorted(n, key=lambda i: (-rho[i] * delta[i], i))[:count])


def nearest_by_hand(d: list[list[float]], centres: list[int]) -> list[int]:
    return [
        centres.index(i)
        if i in centres
        else min(range(len(centres)), key=lambda c: d[i][centres[c]])
        for i in range(len(d))
    ]


def test_dpc_knn_is_the_formula() -> None:
    x = torch.randn(3, 20, 8)
    reduction = DPCKNN(keep=6, k=4).reduce(token_inputs(x, (4, 5)))
    for i, tokens in enumerate(x):
        d = [[v / math.sqrt(8) for v in row] for row in distances_by_hand(tokens)]
        centres = peaks_by_hand(d, 6, 4)
        assert reduction.index[i].tolist() == centres
        assign = nearest_by_hand(d, centres)
        assert reduction.assign[i].tolist() == assign
        for c in range(6):
            members = [j for j in range(20) if assign[j] == c]
            torch.testing.assert_close(reduction.values[i, c], tokens[members].mean(0))
            assert reduction.size[i, c] == len(members)


def test_density_peaks_of_equal_tokens_come_by_order() -> None:
    assert density_peaks(torch.zeros(1, 6, 6), 3, 5).tolist() == [[0, 1, 2]]
    # densities that round to zero are still told apart
    points = torch.tensor([[0.0, 40.0, 80.5, 500.0]])
    far = (points[:, :, None] - points[:, None]).abs()
    assert density_peaks(far, 2, 2).tolist() == [[0, 1]]


def medoids_by_hand(d: list[list[float]], weight: list[float], count: int, times: int) -> list[int]:
    n = range(len(d))
    medoids = sorted(n, key=lambda i: (-weight[i], i))[:count]
    for _ in range(times):
        assign = nearest_by_hand(d, medoids)
        for c in range(count):
            members = [j for j in n if assign[j] == c]
            medoids[c] = min(members, key=lambda i: sum(weight[j] * d[i][j] for j in members))
    return sorted(medoids)


@pytest.mark.parametrize("times", [1, 3])
def test_kmedoids_are_the_formula(times: int) -> None:
    x, weight = torch.randn(3, 20, 6), torch.rand(3, 20)
    distances = squared_distances(x, x).sqrt()
    found = weighted_medoids(distances, weight, 7, times)
    for i in range(3):
        d = distances_by_hand(x[i])
        assert found[i].tolist() == medoids_by_hand(d, weight[i].tolist(), 7, times)
    # two medoids on one spot: each keeps its own cluster
    twins = torch.tensor([[[0.0], [0.0], [3.0]]])
    same = squared_distances(twins, twins).sqrt()
    assert weighted_medoids(same, torch.tensor([[3.0, 2.0, 1.0]]), 2, 3).tolist() == [[0, 1]]
    assert to_nearest(same, torch.tensor([[0, 1]])).tolist() == [[0, 1, 0]]


def entering(model: Any, layer: int, x: Tensor) -> Tensor:
    """What the norm before attention gets in a block."""
    seen: list[Tensor] = []
    hook = model.blocks[layer].norm1.register_forward_pre_hook(lambda _, a: seen.append(a[0]))
    model(x)
    hook.remove()
    return seen[0]


def test_kmedoids_come_at_the_exit_by_the_attention_of_the_block() -> None:
    model: Any = tiny_vit()
    x = tiny_images(2)
    with torch.no_grad():
        whole = entering(model, 1, x)
        with sparsiattn.patch(model, KMedoids(keep=20, layers=[0])) as live:
            short, source = entering(model, 1, x), live.source()
        plain = PlainViT(model)
        for i in range(2):
            first = model._pos_embed(model.patch_embed(x[i : i + 1]))[0]
            _, weights, _ = plain.attend(
                model.blocks[0].attn, model.blocks[0].norm1(first), [1.0] * 65
            )
            received = weights.mean(0).sum(0)[1:].tolist()
            d = distances_by_hand(whole[i, 1:])
            medoids = medoids_by_hand(d, received, 20, 3)
            torch.testing.assert_close(short[i, 1:], whole[i, 1:][medoids])
            torch.testing.assert_close(short[i, 0], whole[i, 0])
            assert (source[i, 1:] - 1).tolist() == nearest_by_hand(d, medoids)


def local_by_hand(x: Tensor, grid: tuple[int, int], near: int, alpha: float) -> Any:
    rows, columns = grid
    d, n = distances_by_hand(x), range(rows * columns)
    far = [
        [(i // columns - j // columns) ** 2 + (i % columns - j % columns) ** 2 for j in n]
        for i in n
    ]
    local = [[math.inf] * len(n) for _ in n]
    for i in n:
        for rank, j in enumerate(sorted(n, key=lambda j: (far[i][j], j))[:near]):
            factor = alpha + (1 - alpha) * rank / near
            local[i][j] = d[i][j] / math.sqrt(x.shape[1]) * factor
    return local, far


@pytest.mark.parametrize(("near", "keep"), [(0.25, 8), (4, 3)])
def test_ailurus_is_the_formula(near: int | float, keep: int) -> None:
    grid, x = (4, 6), torch.randn(2, 24, 8)
    strategy = AiluRus(keep=keep, neighbours=near, alpha=0.3, k=3, detail=True)
    reduction = strategy.reduce(token_inputs(x, grid))
    later = torch.randn(2, keep, 8)
    for i in range(2):
        local, far = local_by_hand(x[i], grid, 6 if near == 0.25 else near, 0.3)
        centres = peaks_by_hand(local, keep, 3)
        assert reduction.index[i].tolist() == centres
        reachable = [min(local[j][c] for c in centres) < math.inf for j in range(24)]
        assert near == 0.25 or not all(reachable)
        assign = [nearest_by_hand(local if reachable[j] else far, centres)[j] for j in range(24)]
        assert reduction.assign[i].tolist() == assign
        means = [x[i][[j for j in range(24) if assign[j] == c]].mean(0) for c in range(keep)]
        torch.testing.assert_close(reduction.values[i], torch.stack(means))
        unfolded = [later[i, c] + x[i, j] - means[c] for j, c in enumerate(assign)]
        torch.testing.assert_close(reduction.unfold(later)[i], torch.stack(unfolded))


def test_ailurus_knows_where_merged_tokens_are() -> None:
    """After an earlier reduction, neighbours are those in the image, not in the sequence."""
    x, ids = torch.randn(1, 4, 8), torch.tensor([[0, 15, 1, 14]])
    strategy = AiluRus(keep=2, neighbours=2, alpha=1.0, k=1, layers=[0])
    reduction = strategy.reduce(token_inputs(x, (4, 4), ids=ids))
    assert partition(reduction.assign[0].tolist()) == {frozenset({0, 2}), frozenset({1, 3})}


def superpixels_by_hand(x: Tensor, grid: Any, cells: Any, strategy: Expedit) -> Tensor:
    """Centroids ``[m, C]``: Expedit's clustering, one token at a time."""
    image = x.T.reshape(-1, *grid)
    centroids = []
    for r in range(cells[0]):
        for c in range(cells[1]):
            top, left = r * grid[0] // cells[0], c * grid[1] // cells[1]
            bottom, right = -(-(r + 1) * grid[0] // cells[0]), -(-(c + 1) * grid[1] // cells[1])
            centroids.append(image[:, top:bottom, left:right].mean((1, 2)))
    for _ in range(strategy.iterations):
        shares: list[list[tuple[int, float]]] = []
        for j in range(len(x)):
            home = (j // grid[1] * cells[0] // grid[0], j % grid[1] * cells[1] // grid[1])
            near = [
                (m, math.exp(-strategy.temperature * float((x[j] - centroids[m]).square().sum())))
                for m in range(len(centroids))
                if abs(m // cells[1] - home[0]) <= strategy.radius
                and abs(m % cells[1] - home[1]) <= strategy.radius
            ]
            total = sum(w for _, w in near)
            shares.append([(m, w / total) for m, w in near])
        sums = [torch.zeros(x.shape[1]) for _ in centroids]
        weights = [0.0] * len(centroids)
        for j, row in enumerate(shares):
            for m, w in row:
                sums[m], weights[m] = sums[m] + w * x[j], weights[m] + w
        centroids = [s / w for s, w in zip(sums, weights, strict=True)]
    return torch.stack(centroids)


def reconstructed_by_hand(x: Tensor, before: Tensor, later: Tensor, strategy: Expedit) -> Tensor:
    rows = []
    for token in x:
        d = [float((token - c).square().sum()) for c in before]
        nearest = sorted(range(len(d)), key=lambda m: d[m])[: strategy.neighbours]
        w = [math.exp(-strategy.temperature * d[m]) for m in nearest]
        rows.append(sum(v / sum(w) * later[m] for v, m in zip(w, nearest, strict=True)))
    return torch.stack(rows)


@pytest.mark.parametrize(("grid", "cells"), [((6, 8), (4, 5)), ((5, 7), (5, 3))])
def test_expedit_is_the_formula(grid: tuple[int, int], cells: tuple[int, int]) -> None:
    strategy = Expedit(cells=cells, temperature=0.1, radius=1, neighbours=4, iterations=3)
    x = torch.randn(2, grid[0] * grid[1], 6)
    reduction = strategy.reduce(token_inputs(x, grid))
    later = torch.randn(2, cells[0] * cells[1], 6)
    for i in range(2):
        centroids = superpixels_by_hand(x[i], grid, cells, strategy)
        torch.testing.assert_close(reduction.values[i], centroids, rtol=1e-4, atol=1e-5)
        expected = reconstructed_by_hand(x[i], centroids, later[i], strategy)
        torch.testing.assert_close(reduction.unfold(later)[i], expected, rtol=1e-4, atol=1e-5)
        labels = [
            min(range(len(centroids)), key=lambda m: float((t - centroids[m]).norm())) for t in x[i]
        ]
        assert reduction.assign[i].tolist() == labels
    middle = reduction.index[0].tolist()
    assert middle[0] == (grid[0] // cells[0] // 2) * grid[1] + grid[1] // cells[1] // 2
    assert len(set(middle)) == len(middle)


@pytest.mark.parametrize("strategy", [Expedit(layers=[0], temperature=0.02), AiluRus(detail=True)])
def test_dense_consumers_get_what_the_strategy_unfolds(strategy: Clustering) -> None:
    """The last block's short output, unfolded by hand, is what features are."""
    model: Any = tiny_vit()
    x = tiny_images(2)
    layer = strategy.layers_in(2)[0]
    short: list[Tensor] = []
    with torch.no_grad():
        dense = entering(model, layer, x)[:, 1:]
        live = sparsiattn.patch(model, strategy)
        hook = model.blocks[-1].register_forward_hook(lambda _, __, out: short.append(out))
        model(x)
        hook.remove()
        maps = model.forward_intermediates(x, intermediates_only=True, norm=False)
        live.unpatch()
    assert maps[-1].shape == (2, 48, 8, 8)
    reduction = strategy.reduce(token_inputs(dense, (8, 8)))
    unfolded = reduction.unfold(short[0][:, 1:])
    torch.testing.assert_close(maps[-1].flatten(2).mT, unfolded, rtol=1e-4, atol=1e-4)
    assert short[0].shape[1] < 65


def test_scatter_leaves_merged_positions_at_their_last_value() -> None:
    model: Any = tiny_vit()
    x = tiny_images(1)
    strategy = AiluRus(keep=36, layers=[1], restore="scatter")
    with torch.no_grad():
        dense = entering(model, 1, x)[0, 1:]
        with sparsiattn.patch(model, strategy):
            features = model.blocks(model._pos_embed(model.patch_embed(x)))[0, 1:]
    same = (features - dense).abs().amax(1) < 1e-6
    assert int(same.sum()) == 64 - 36


def test_expedit_without_fine_grid() -> None:
    assert Expedit(keep=0.49).grid_of(40, 40) == (28, 28)
    assert Expedit(keep=30).grid_of(8, 8) == (5, 5)
    assert Expedit(keep=0.01).grid_of(3, 3) == (1, 1)
    assert Expedit(cells=[9, 4]).grid_of(8, 8) == (8, 4)
    fewer = token_inputs(torch.randn(1, 12, 4), (4, 4), ids=torch.arange(12)[None])
    with pytest.raises(sparsiattn.InvalidOption, match="merged before"):
        Expedit().reduce(fewer)


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
@pytest.mark.parametrize("strategy", zoo.slow_but([ALL[0], ALL[-1]], *ALL[1:-1]))
def test_dtypes_an_empty_batch_and_other_resolutions(strategy: Clustering) -> None:
    model, x = tiny_vit(dynamic_img_size=True), tiny_images(2)
    with torch.no_grad(), sparsiattn.patch(model, strategy):
        assert model.blocks(torch.randn(0, 65, 48)).shape[0] == 0
        other = torch.randn(2, 3, 40, 24)
        assert model(other).shape == (2, 5)
        maps = model.forward_intermediates(other, intermediates_only=True)
        assert [tuple(m.shape[2:]) for m in maps] == [(10, 6)] * 2
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.isfinite(model(x)).all()
        model.bfloat16()
        assert torch.isfinite(model(x.bfloat16())).all()
        model.double()
        assert model(x.double()).dtype == torch.float64


@pytest.mark.parametrize("strategy", zoo.slow_but(ALL[:1], *ALL[1:]))
def test_one_graph_and_export(strategy: Clustering) -> None:
    model, x = tiny_vit(), tiny_images(2)
    with torch.no_grad(), sparsiattn.patch(model, strategy):
        exact = model(x)
        torch.compiler.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), exact, rtol=1e-4, atol=1e-5)
        program = torch.export.export(model, (x,))
        torch.testing.assert_close(program.module()(x), exact)
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ALL, ids=IDS)
def test_compiled_to_code_dense_and_saved(strategy: Clustering, tmp_path: Any) -> None:
    """Inductor, features in one graph, and an exported program from disk."""
    model: Any = tiny_vit()
    x = tiny_images(2)
    with torch.no_grad(), sparsiattn.patch(model, strategy):
        exact, features = model(x), model.forward_features(x)
        torch.compiler.reset()
        compiled = torch.compile(model, fullgraph=True)
        torch.testing.assert_close(compiled(x), exact, rtol=1e-4, atol=1e-5)
        dense = torch.compile(model.forward_features, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(dense(x), features, rtol=1e-4, atol=1e-5)
        torch.export.save(torch.export.export(model, (x,)), tmp_path / "model.pt2")
    again = torch.export.load(tmp_path / "model.pt2")
    torch.testing.assert_close(again.module()(x), exact)
    torch.compiler.reset()


@pytest.mark.parametrize("family", zoo.slow_but(["eva_rope"], "vit_relpos", "dinov3"))
@pytest.mark.parametrize("strategy", zoo.slow_but([ALL[-1]], *ALL[:-1]))
def test_positions_follow_the_clusters(family: str, strategy: Clustering) -> None:
    model = zoo.build(family)
    x = zoo.images(model)
    with torch.no_grad(), sparsiattn.patch(model, strategy):
        together, alone = model(x), torch.cat([model(one[None]) for one in x])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("strategy", zoo.slow_but([ALL[3]], *ALL[:3], *ALL[4:]))
def test_windows_are_refused(strategy: Clustering) -> None:
    with pytest.raises(sparsiattn.InvalidOption, match="windows or changes its grid"):
        sparsiattn.patch(zoo.build("swin"), strategy)


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        (ATC, {"linkage": "ward"}, "linkage must be one of"),
        (ATC, {"r": -1}, "r must be an int >= 0"),
        (ATC, {"proportional": 1}, "proportional must be True or False"),
        (KMedoids, {"iterations": 0}, "iterations must be an int >= 1"),
        (DPCKNN, {"k": 0.5}, "k must be an int >= 1"),
        (DPCKNN, {"keep": 0.0}, "keep must be"),
        (AiluRus, {"alpha": 2.0}, "alpha must be a number"),
        (AiluRus, {"neighbours": 1.5}, "neighbours must be"),
        (Expedit, {"temperature": 0.0}, "temperature must be"),
        (Expedit, {"cells": (3,)}, "cells must be"),
        (Expedit, {"layers": [0, 1]}, "only once"),
        (Expedit, {"restore": "scatter"}, "no patch in particular"),
    ],
)
def test_wrong_options(kind: Any, options: dict[str, Any], said: str) -> None:
    with pytest.raises(sparsiattn.SparsiattnError, match=said):
        kind(**options)


@pytest.mark.parametrize(
    "strategy", [ATC(r=64, layers=[0]), ATC(keep=65, layers=[0]), DPCKNN(keep=[40, 41])]
)
def test_more_than_there_is(strategy: Clustering) -> None:
    with pytest.raises(sparsiattn.InvalidOption, match="patch tokens there"):
        sparsiattn.patch(tiny_vit(), strategy)


def test_attention_received_is_the_mean_of_the_columns() -> None:
    inputs = random_inputs((4, 4), bias=torch.randn(2, 3, 17, 17), kind="bias")
    tokens = TokenInputs(torch.randn(2, 16, 8), inputs.site, inputs, 0, 1)
    whole = inputs.logits().softmax(-1)
    torch.testing.assert_close(tokens.received_attention(), whole.mean((1, 2))[:, 1:])


def test_clusterings_survive_saving(tmp_path: Any) -> None:
    model, x = tiny_vit(), tiny_images(2)
    with torch.no_grad():
        for strategy in ALL[-1:]:
            with sparsiattn.patch(model, strategy) as live:
                expected, folder = model(x), tmp_path / strategy.name
                live.save(folder)
            with sparsiattn.load(model, folder) as live:
                assert torch.equal(model(x), expected)
                assert live.tokens == strategy.__class__.build(live.tokens.to_dict()["options"])
