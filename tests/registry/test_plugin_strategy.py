"""A complete strategy as a plug-in: its suites, by name, on disk."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

import sparsiattn
from sparsiattn import AttentionInputs, Pattern, Strategy
from sparsiattn.testing import StrategySuite, temporary_plugin, tiny_images, tiny_vit


@dataclass(frozen=True)
class Nearest(Strategy):
    """Each query attends to its k nearest keys by cosine."""

    name = "nearest"
    k: float = 0.1

    def plan(self, inputs: AttentionInputs) -> Pattern:
        scores = normalize(inputs.q, dim=-1) @ normalize(inputs.k, dim=-1).mT
        return Pattern.top(scores, self.k)


@pytest.fixture
def nearest() -> Iterator[None]:
    with temporary_plugin(strategies=[Nearest]):
        yield


@pytest.mark.usefixtures("nearest")
class TestNearest(StrategySuite):
    """The plug-in of design section 8, complete."""

    strategy = Nearest(k=0.2)


@pytest.mark.usefixtures("nearest")
class TestNearestTilesBackground(StrategySuite):
    strategy = Nearest(k=0.2, tile=(2, 2), background=2)


@pytest.mark.usefixtures("nearest")
class TestNearestByName:
    def test_patch(self) -> None:
        model, x = tiny_vit(), tiny_images()
        with torch.no_grad():
            dense = model(x)
            with sparsiattn.patch(model, "nearest", k=0.2, tile=(2, 2), background=2) as live:
                assert live.strategy == Nearest(k=0.2, tile=(2, 2), background=2)
                assert not torch.equal(model(x), dense)
                assert "nearest" in str(live.report())
            assert torch.equal(model(x), dense)

    def test_listed(self) -> None:
        info = sparsiattn.list_strategies()["nearest"]
        assert info.summary == "Each query attends to its k nearest keys by cosine."
        assert info.plugin == "temporary"
        assert info.usable

    def test_tiles_and_background_are_the_core_s_work(self) -> None:
        """The same keys for a whole tile, CLS column always kept, budget exact."""
        model, x = tiny_vit(), tiny_images()
        seen: list[Tensor] = []

        def look(site: sparsiattn.Site, planner: object, inputs: AttentionInputs) -> None:
            runtime = live.runtimes[site.index]
            assert callable(planner)
            pattern = runtime.finish(
                planner(inputs.replace(tile=(2, 2))), inputs.replace(tile=(2, 2))
            )
            assert pattern.summary is not None
            assert pattern.summary.count == 4
            seen.append(pattern.to_mask()[:, :, 1:])

        with torch.no_grad(), sparsiattn.patch(
            model, "nearest", k=0.2, tile=(2, 2), background=2
        ) as live, live.observing(look):  # fmt: skip
            model(x)
        assert len(seen) == 2
        for mask in seen:
            assert mask[..., 0].all()
            assert (mask.sum(-1) == 13).all()  # ceil(0.2 * 65)
            square = mask.unflatten(2, (4, 2, 4, 2))
            assert torch.equal(square, square[:, :, :, :1, :, :1].expand_as(square))

    def test_save_and_load(self, tmp_path: Path) -> None:
        model, twin, x = tiny_vit(), tiny_vit(), tiny_images()
        with torch.no_grad(), sparsiattn.patch(model, "nearest", k=0.2, tile=(2, 2)) as live:
            sparse = model(x)
            sparsiattn.load(twin, live.save(tmp_path))
            assert torch.equal(twin(x), sparse)


def test_saved_patch_of_a_plugin_that_is_gone(tmp_path: Path) -> None:
    model = tiny_vit()
    with temporary_plugin(strategies=[Nearest]), sparsiattn.patch(model, "nearest") as live:
        live.save(tmp_path)
    with pytest.raises(sparsiattn.UnknownName, match="'nearest'"):
        sparsiattn.load(model, tmp_path)
    assert sparsiattn.patch_of(model) is None
