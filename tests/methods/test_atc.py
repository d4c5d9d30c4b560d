"""ATC: agglomeration as scipy does it, in a whole model, and its published counts."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import sparsiattn
from sparsiattn.methods.atc import ATC, LINKAGES, agglomerate, numbered
from sparsiattn.methods.clusters import published_counts
from sparsiattn.testing import tiny_images, tiny_vit
from tests.support.clustering import partition
from tests.support.plain_vit import PlainViT
from tests.support.token_macs import check as check_macs
from tests.support.token_macs import deit
from tests.support.token_macs import tokens as counted


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
