"""What ranks the keys of `connectivity`: the queries' own logits at first, then the predictor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparsiattn
from sparsiattn.attention.auto_options import auto_background
from sparsiattn.errors import InvalidOption
from sparsiattn.serialization.files import with_checksum
from sparsiattn.strategies import Connectivity, TopK
from sparsiattn.testing import tiny_images, tiny_vit

OPTIONS: list[dict[str, Any]] = [{}, {"tile": (4, 4)}, {"tile": (4, 4), "background": None}]


def outputs(model: nn.Module, strategy: sparsiattn.Strategy) -> Tensor:
    with torch.no_grad(), sparsiattn.patch(model, strategy):
        return model(tiny_images(2))  # type: ignore[no-any-return]


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return tiny_vit()


@pytest.mark.parametrize("options", OPTIONS)
def test_untrained_and_exact_are_one(model: nn.Module, options: dict[str, Any]) -> None:
    auto = outputs(model, Connectivity(0.2, **options))
    assert torch.equal(auto, outputs(model, Connectivity(0.2, scores="exact", **options)))
    assert not torch.equal(auto, outputs(model, Connectivity(0.2, scores="predictor", **options)))


def test_every_query_keeps_what_topk_keeps(model: nn.Module) -> None:
    same = outputs(model, TopK(0.2, background="auto"))
    torch.testing.assert_close(outputs(model, Connectivity(0.2)), same)


@pytest.mark.parametrize("options", [{"basis": 6}, {"self_weight": None}, {"channels": 4}])
def test_an_option_of_the_predictor_asks_for_it(model: nn.Module, options: dict[str, Any]) -> None:
    asked = outputs(model, Connectivity(0.2, **options))
    assert torch.equal(asked, outputs(model, Connectivity(0.2, scores="predictor", **options)))


def test_tables_of_sites_alike_are_their_own(model: nn.Module) -> None:
    patch = sparsiattn.patch(model, "connectivity")
    planners: list[Any] = [runtime.planner for runtime in patch.runtimes]
    planners[0].down.data.add_(1.0)  # to all values: the next check of a part sees it
    planners.append(Connectivity().planner(patch.sites[0]))
    assert [planner.is_fitted() for planner in planners] == [True] + [False] * (len(planners) - 1)


@pytest.mark.parametrize("write", ["add", "data", "load"])
def test_a_fitted_predictor_takes_over(model: nn.Module, write: str) -> None:
    images = tiny_images(2)
    patch = sparsiattn.patch(model, "connectivity", k=0.2)
    with torch.no_grad():
        model(images)  # what was known of the weights is now kept
    for runtime in patch.runtimes:
        planner = runtime.planner
        assert isinstance(planner, nn.Module)
        other = torch.rand_like(planner.up)  # type: ignore[arg-type]
        if write == "add":
            with torch.no_grad():
                planner.up.add_(other)  # type: ignore[operator, union-attr]
        elif write == "data":  # autograd counts no such write
            planner.up.data.copy_(other)
        elif write == "load":
            planner.load_state_dict({**planner.state_dict(), "up": other})
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    with torch.no_grad():
        found = model(images)
    patch.unpatch()
    with torch.no_grad(), sparsiattn.patch(model, "connectivity", k=0.2, scores="predictor"):
        model.load_state_dict(weights)
        assert torch.equal(found, model(images))
    with torch.no_grad(), sparsiattn.patch(model, "connectivity", k=0.2, scores="exact"):
        model.load_state_dict(weights)
        assert not torch.equal(found, model(images))


def test_the_report_knows_a_fitted_predictor_before_it_ran(model: nn.Module) -> None:
    with sparsiattn.patch(model, "connectivity", k=0.2, kernel="reference") as patch:
        untrained = patch.report().predictor_macs
        for runtime in patch.runtimes:
            assert isinstance(runtime.planner, nn.Module)
            runtime.planner.up.data.mul_(2.0)  # type: ignore[operator, union-attr]
        fitted = patch.report().predictor_macs
    with sparsiattn.patch(
        model, "connectivity", k=0.2, scores="predictor", kernel="reference"
    ) as patch:
        assert fitted == patch.report().predictor_macs != untrained


@pytest.mark.parametrize("old", [False, True])
def test_files_from_before_load_with_the_predictor(
    model: nn.Module, tmp_path: Path, old: bool
) -> None:
    with sparsiattn.patch(model, "connectivity", k=0.2) as patch:
        patch.save(tmp_path)
    if old:
        file = next(tmp_path.glob("*.json"))
        config = json.loads(file.read_text())
        del config["strategy"]["options"]["scores"]
        file.write_text(json.dumps(with_checksum(config)))
    rule = "predictor" if old else "exact"
    expected = outputs(model, Connectivity(0.2, scores=rule))
    with torch.no_grad(), sparsiattn.load(model, tmp_path):
        assert torch.equal(model(tiny_images(2)), expected)


def test_a_rule_that_there_is_not() -> None:
    with pytest.raises(InvalidOption, match="scores must be one of auto, exact, predictor, got 'l"):
        Connectivity(0.2, scores="lowrank")


def test_summary_keys_follow_the_grid() -> None:
    grids = [(4, 4), (7, 7), (14, 14), (24, 24), (37, 37), (1, 196), (128, 128)]
    assert [auto_background(grid) for grid in grids] == [2, 2, 5, 7, 10, 5, 8]
    assert Connectivity().background_for((14, 14)) == 5
    assert Connectivity(background=3).background_for((14, 14)) == 3
    assert Connectivity(background=None).background_for((14, 14)) is None
