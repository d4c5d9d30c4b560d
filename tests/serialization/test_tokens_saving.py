"""Token strategies on disk, and those of third parties."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import sparsiattn
from sparsiattn import Reduction, SparsiattnError, TokenInputs, TokenStrategy
from sparsiattn.serialization.files import with_checksum
from sparsiattn.strategies import Hybrid, TokenDrop, TokenMerge
from sparsiattn.testing import TokenStrategySuite, temporary_plugin
from tests.support import zoo

SAVED: dict[str, Any] = {
    "drop": TokenDrop(keep=0.6, layers=[0]),
    "list": TokenDrop(keep=[0.6, 10], layers=[0, 1], fuse=True, restore="scatter"),
    "callable": TokenDrop(keep=lambda site: 0.5 + 0.1 * site.index, layers=[0, 1]),
    "learned": TokenDrop(score="learned", keep=0.5),
    "random": TokenDrop(score="random", seed=4),
    "mass": TokenDrop(keep="adaptive", mass=0.6),
    "threshold": TokenDrop(keep="adaptive", threshold=1.0, fuse=True),
    "never": TokenDrop(restore=None),
    "merge": TokenMerge(r=6),
    "share": TokenMerge(),
    "inflect": TokenMerge(r=(6, 0.5)),
    "lists": TokenMerge(r=[6, 3], proportional=False),
    "rates": TokenMerge(r=lambda site: 3 + site.index),
    "pitome": TokenMerge(method="pitome", ratio=0.8, bsm="last"),
    "hybrid": Hybrid(k=0.3, keep=0.6),
    "hybrid_lists": Hybrid(k=[0.3, 0.5], keep=[0.6, 0.5], layers=[0, 1]),
    "hybrid_calls": Hybrid(k=lambda s: 0.3, keep=lambda s: 0.6, layers=[1]),
    "hybrid_learned": Hybrid(k=0.3, tokens=TokenDrop(score="learned", keep=0.4)),
    "hybrid_merge": Hybrid(k=0.3, attention="local", tokens=TokenMerge(r=5), background=None),
}


@pytest.mark.parametrize("which", SAVED)
@pytest.mark.parametrize("only_if_faster", [False, True])
def test_round_trip_gives_the_same_bits(which: str, only_if_faster: bool, tmp_path: Path) -> None:
    model = zoo.build("vit")
    x = zoo.images(model)
    with torch.no_grad():
        dense = model(x)
        with sparsiattn.patch(model, SAVED[which], only_if_faster=only_if_faster) as live:
            _shake(model)
            sparse = model(x)
            assert not torch.equal(sparse, dense)
            live.save(tmp_path / "a")
        config = json.loads((tmp_path / "a" / "sparsiattn.json").read_text())
        assert config["strategy"]["name"] == SAVED[which].name
        with sparsiattn.load(model, tmp_path / "a") as again:
            assert torch.equal(model(x), sparse)
            again.save(tmp_path / "b")
        assert torch.equal(model(x), dense)
    for name in ("sparsiattn.json", "planners.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize(
    ("options", "rates"),
    [({"r": 8, "ratio": None}, [8, 8]), ({"r": 8, "ratio": 0.8}, [12, 10])],
    ids=["the number that was the default", "a share beside that number"],
)
def test_rates_of_files_from_before_shares_were_the_default(
    options: dict[str, Any], rates: list[int], tmp_path: Path
) -> None:
    model = zoo.build("vit")
    with sparsiattn.patch(model, TokenMerge(ratio=0.9)) as live:
        live.save(tmp_path)
    config = json.loads((tmp_path / "sparsiattn.json").read_text())
    config["strategy"]["options"].update(options)
    (tmp_path / "sparsiattn.json").write_text(json.dumps(with_checksum(config)))
    with sparsiattn.load(model, tmp_path) as live, torch.no_grad():
        model(zoo.images(model))
        assert live.last_pass is not None
        steps = live.last_pass[0].steps
    assert [step.before - step.index.shape[1] for step in steps][:2] == rates


def _shake(model: nn.Module) -> None:
    """Planner weights unlike those a fresh patch draws."""
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if ".sparsiattn." in name:
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("which", SAVED)
def test_a_resolved_config_has_no_functions(which: str, tmp_path: Path) -> None:
    model = zoo.build("vit")
    with sparsiattn.patch(model, SAVED[which]) as live:
        live.save(tmp_path)
    options = json.loads((tmp_path / "sparsiattn.json").read_text())["strategy"]["options"]
    if which == "callable":
        assert options["keep"] == [0.5, 0.6]
    if which == "rates":
        assert options["r"] == [3, 4]
    if isinstance(SAVED[which], TokenStrategy):
        assert options["layers"], "default layers must be written out"


@pytest.mark.parametrize(
    ("at", "value"),
    [("keep", 0), ("keep", "0.5"), ("keep", 1000), ("layers", [9]), ("layers", None),
     ("layers", []), ("score", "nothing"), ("restore", "pad"), ("extra", 1)],
)  # fmt: skip
def test_edited_files_are_refused(at: str, value: Any, tmp_path: Path) -> None:
    model = zoo.build("vit")
    with sparsiattn.patch(model, "token_drop", keep=0.5, layers=[0]) as live:
        live.save(tmp_path)
    path = tmp_path / "sparsiattn.json"
    config = json.loads(path.read_text())
    config["strategy"]["options"][at] = value
    path.write_text(json.dumps(with_checksum(config)))
    if (at, value) == ("layers", None):
        sparsiattn.load(model, tmp_path).unpatch()
        return
    with pytest.raises(SparsiattnError):
        sparsiattn.load(model, tmp_path)
    assert sparsiattn.patch_of(model) is None


@dataclass(frozen=True)
class EveryThird(TokenStrategy):
    """Drops every third token."""

    name = "every_third"
    keep: float = 0.7

    def reduce(self, tokens: TokenInputs) -> Reduction | None:
        kept = torch.tensor([i for i in range(tokens.count) if i % 3 or self.keep == 1.0])
        return Reduction.keep(kept.expand(len(tokens.x), -1))


@dataclass(frozen=True)
class Pairs(TokenStrategy):
    """Merges neighbours."""

    name = "pairs"
    keep: float = 0.5
    place = "entry"

    def merges(self) -> bool:
        return True

    def proportional_attention(self) -> bool:
        return True

    def reduce(self, tokens: TokenInputs) -> Reduction | None:
        if self.keep == 1.0 or tokens.count < 2:
            return None
        at = torch.arange(tokens.count).expand(len(tokens.x), -1)
        return Reduction.merge(tokens.x, at // 2, at[:, ::2], tokens.size)


@pytest.fixture(autouse=True)
def _registered() -> Any:
    with temporary_plugin(strategies=[EveryThird, Pairs]):
        yield


class TestEveryThird(TokenStrategySuite):
    strategy = EveryThird()
    test_its_import_brings_nothing_heavy = None  # a module of tests may bring what it likes

    def ordered(self) -> bool:
        return True


class TestPairs(TokenStrategySuite):
    strategy = Pairs()
    test_its_import_brings_nothing_heavy = None

    def ordered(self) -> bool:
        return True


@pytest.mark.parametrize("name", ["every_third", "pairs"])
def test_third_party_strategies_by_name(name: str, tmp_path: Path) -> None:
    model = zoo.build("beit")
    x = zoo.images(model)
    with torch.no_grad():
        with sparsiattn.patch(model, name, layers=[0]) as live:
            sparse, report = model(x), live.report()
            live.save(tmp_path)
        assert report.macs is not None
        assert report.macs < report.macs_dense
        with sparsiattn.load(model, tmp_path):
            assert torch.equal(model(x), sparse)
        with sparsiattn.patch(model, "hybrid", k=0.5, tokens=name, only_if_faster=False):
            assert not torch.equal(model(x), sparse)
