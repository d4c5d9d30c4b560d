"""What every clustering of tokens keeps: its suite, dtypes, compilers, files, refusals."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import nn

import sparsiattn
from sparsiattn.methods.ailurus import AiluRus
from sparsiattn.methods.atc import ATC
from sparsiattn.methods.clusters import Clustering
from sparsiattn.methods.dpc_knn import DPCKNN
from sparsiattn.methods.expedit import Expedit
from sparsiattn.methods.kmedoids import KMedoids
from sparsiattn.strategies import TokenInputs
from sparsiattn.testing import TokenStrategySuite, random_inputs, tiny_images, tiny_vit
from tests.support import zoo


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
        (Expedit, {"layers": [0, 1]}, "grid of tokens once"),
        (Expedit, {"restore": "scatter"}, "do not correspond to single patches"),
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
