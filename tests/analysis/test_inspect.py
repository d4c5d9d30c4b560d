"""`inspect`: its figures are those of patches and of arithmetic, and the model stays as it was."""

from __future__ import annotations

import inspect as standard
import json
import math
import re
from dataclasses import FrozenInstanceError, dataclass, replace
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import sparsiattn
from sparsiattn import AttentionInputs, Pattern, Planner, Site, SparsiattnError, Strategy
from sparsiattn.cli import app
from sparsiattn.patching import install
from sparsiattn.patching.discovery.backbone import SINGLE
from sparsiattn.patching.text import percent
from sparsiattn.testing import temporary_plugin
from tests.support import hosts, zoo

EVERY = zoo.CORE


def assert_is_what_patches_report(model: nn.Module, names: list[str], **given: Any) -> None:
    """Site by site and in all, a strategy that is refused by its error's own words."""
    found = sparsiattn.inspect(model, strategies=names, **given)
    assert [saving.name for saving in found.strategies] == names
    for saving in found.strategies:
        if saving.reason:
            assert saving.saves is None
            with pytest.raises(SparsiattnError, match=f"^{re.escape(saving.reason)}$"):
                sparsiattn.patch(model, saving.name, only_if_faster=False, **given)
            continue
        with sparsiattn.patch(model, saving.name, only_if_faster=False, **given) as live:
            report, sites = live.report(), live.model_sites
        assert report.macs is not None
        assert found.macs == report.macs_dense
        assert found.mhsa_macs == report.mhsa_macs_dense
        assert found.skipped == report.skipped
        assert saving.saves == pytest.approx(1 - report.macs / report.macs_dense, abs=1e-12)
        assert [one.name for one in found.sites] == [site.name for site in sites]
        for one, site, row in zip(found.sites, sites, report.sites, strict=True):
            fields = ("tokens", "keys", "heads", "head_dim", "grid", "prefix_tokens", "windows")
            for field in (*fields, "calls", "macs"):
                assert getattr(one, field) == getattr(site, field)
            assert one.share == site.macs / report.macs_dense
            assert (saving.name in one.saves) == (saving.kind == "attention")
            if saving.kind == "attention":
                spared = row.macs_dense - row.macs - row.predictor_macs
                assert one.saves[saving.name] == spared / report.macs_dense


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_figures_are_those_of_patches(family: str) -> None:
    assert_is_what_patches_report(zoo.build(family), ["local"])


@pytest.mark.parametrize("family", ["vit", "swin"])
def test_figures_of_every_strategy(family: str) -> None:
    assert_is_what_patches_report(zoo.build(family), EVERY)


@pytest.mark.slow
@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_figures_of_every_strategy_on_every_family(family: str) -> None:
    assert_is_what_patches_report(zoo.build(family), EVERY)


@pytest.mark.parametrize("name", ["clip", "siglip", "clip_tower", "encoder"])
def test_figures_of_hosts_outside_timm(name: str) -> None:
    model = hosts.build(name)
    assert_is_what_patches_report(model, ["local"], input=(1, 3, 32, 32))


def deit_tiny_macs(tokens: list[tuple[int, int]]) -> int:
    """By hand: the embedding, twelve blocks with so many tokens in (attention, MLP), the head."""
    width = 192
    blocks = sum(
        (4 * width + 2 * n) * width * n + 8 * width * width * m  # qkv, projection, QK^T, AV; MLP
        for n, m in tokens
    )
    return 196 * 3 * 16 * 16 * width + blocks + width * 1000


def test_deit_tiny_by_hand() -> None:
    with torch.device("meta"):
        model = timm.create_model("deit_tiny_patch16_224")
    found = sparsiattn.inspect(model, strategies=["dense", "local", "token_drop"])
    total = deit_tiny_macs([(197, 197)] * 12)
    assert found.macs == total
    assert found.mhsa_macs == 12 * 2 * 197**2 * 192
    assert found.mhsa_macs / total == pytest.approx(0.1426, abs=1e-4)

    site = found.sites[3]
    assert (site.name, site.tokens, site.keys, site.heads) == ("blocks.3.attn", 197, 197, 3)
    assert (site.head_dim, site.grid, site.prefix_tokens, site.windows) == (64, (14, 14), 1, 1)
    assert site.share == 2 * 197**2 * 192 / total
    # a quarter of the keys and 2 x 2 summary keys for every patch, all keys for the class token
    kept = 2 * 192 * (196 * (math.ceil(197 / 4) + 4) + 197 + 4 * 197)
    assert site.saves == {"dense": 0.0, "local": (2 * 197**2 * 192 - kept) / total}

    dense, local, drop = found.strategies
    assert dense.saves == 0.0
    assert local.saves == pytest.approx(12 * site.saves["local"])
    counts = [197, 1 + 138, 1 + 97, 1 + 68]  # 70 % of the patches are left at blocks 3, 6 and 9
    tokens = [(counts[i // 3 - (i > 0 and i % 3 == 0)], counts[i // 3]) for i in range(12)]
    scores = 192 * (197 + 139 + 98)  # the class token's row of QK^T, once more
    assert drop.saves == pytest.approx(1 - (deit_tiny_macs(tokens) + scores) / total)
    assert (drop.budget, local.budget, dense.budget) == ("keep=0.7", "k=0.25", "")


def state(model: nn.Module) -> dict[str, Any]:
    """Everything about a model that could be changed, by value or by identity."""
    kept: dict[str, Any] = {name: value.clone() for name, value in model.state_dict().items()}
    for name, module in model.named_modules():
        kept[f"{name}: class"] = type(module)
        for attribute, value in vars(module).items():
            inside = list(value) if isinstance(value, dict) else []
            kept[f"{name}: {attribute}"] = (id(value), inside)
    return kept


def assert_untouched(model: nn.Module, **given: Any) -> None:
    before, random = state(model), torch.get_rng_state()
    sparsiattn.inspect(model, **given)
    after = state(model)
    assert list(before) == list(after)
    for name, value in before.items():
        same = torch.equal(value, after[name]) if isinstance(value, Tensor) else None
        assert same or value == after[name], name
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("training", [False, True])
def test_the_model_stays_as_it_was(training: bool) -> None:
    tried = ["connectivity", "hybrid"] if training else EVERY
    for model in (zoo.build("vit_unfused"), hosts.build("encoder")):
        assert_untouched(model.train(training), input=(1, 3, 32, 32), strategies=tried)
        assert all(module.training == training for module in model.modules())


def test_compiled_graphs_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attaching a patch has Dynamo forget its graphs; looking at a model must not."""
    calls: list[int] = []
    monkeypatch.setattr(install, "forget_compiled", lambda: calls.append(1))
    model = zoo.build("vit")
    sparsiattn.inspect(model, strategies=["connectivity", "token_drop"])
    assert calls == []
    sparsiattn.patch(model, "dense")
    assert calls == [1]


@pytest.mark.parametrize(
    ("build", "name", "strategy"),
    [
        (zoo.build, "vit", "connectivity"),
        (zoo.build, "vit", "token_merge"),
        (zoo.build, "vit_unfused", "hybrid"),
        (zoo.build, "swin", "connectivity"),
        (hosts.build, "clip_tower", "connectivity"),
        (hosts.build, "vit", "token_drop"),
    ],
)
def test_a_patched_model_is_described_without_its_patch(
    build: Any, name: str, strategy: str
) -> None:
    model = build(name)
    tried = ["local", "token_drop"]
    bare = sparsiattn.inspect(model, strategies=tried)
    assert bare.patched == ""
    live = sparsiattn.patch(model, strategy)
    assert_untouched(model, strategies=tried)
    found = sparsiattn.inspect(model, strategies=tried)
    assert sparsiattn.patch_of(model) is live
    assert found.patched == repr(live)
    assert f"described without {live!r}" in str(found)
    assert {**found.to_dict(), "patched": ""} == bare.to_dict()


def test_attention_written_by_hand_is_described_alike_with_and_without_a_patch() -> None:
    model = timm.create_model("levit_128s")
    bare = sparsiattn.inspect(model, strategies="local")
    assert bare.sites[0].name == "stages.0.blocks.0.attn"
    sparsiattn.patch(model, "local")
    assert_untouched(model, strategies="local")
    found = sparsiattn.inspect(model, strategies="local")
    assert {**found.to_dict(), "patched": ""} == bare.to_dict()


def test_what_a_patch_was_told_need_not_be_told_again() -> None:
    model = hosts.build("encoder")
    with pytest.raises(sparsiattn.InvalidOption, match="does not state its input size"):
        sparsiattn.inspect(model)
    sparsiattn.patch(model, "local", input=(1, 3, 24, 32))
    assert sparsiattn.inspect(model, strategies=[]).sites[0].grid == (6, 8)
    part = model.encoder
    with pytest.raises(sparsiattn.InvalidOption, match="does not state its input size"):
        sparsiattn.inspect(part)


def test_input_is_a_shape_or_an_example() -> None:
    model = hosts.build("encoder")
    by_shape = sparsiattn.inspect(model, (1, 3, 16, 32), strategies=[])
    assert sparsiattn.inspect(model, torch.randn(5, 3, 16, 32), strategies=[]) == by_shape
    assert by_shape.input_shape == (1, 3, 16, 32)
    assert [site.grid for site in by_shape.sites] == [(4, 8), (4, 8)]
    with pytest.raises(sparsiattn.ProbeFailed, match="failed"):
        sparsiattn.inspect(model, (1, 4, 16, 32))


def test_the_meta_device_and_wrappers() -> None:
    model = zoo.build("vit")
    bare = sparsiattn.inspect(model, strategies=["connectivity"])
    assert sparsiattn.inspect(nn.DataParallel(model), strategies=["connectivity"]) == bare
    assert sparsiattn.inspect(model.to("meta"), strategies=["connectivity"]) == bare


def test_no_attention_is_no_error() -> None:
    class Convolution(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(3, 8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)

    found = sparsiattn.inspect(Convolution(), (1, 3, 10, 10))
    assert (found.sites, found.skipped, found.mhsa_macs) == ((), (), 0)
    assert found.macs == 8 * 8 * 8 * 27
    assert [saving.name for saving in found.strategies] == EVERY
    assert all("no module of the model computes" in saving.reason for saving in found.strategies)
    assert "no module of the model computes" in str(found)
    assert str(found).startswith("nothing to patch: Convolution")


def test_what_is_left_alone_has_its_reason() -> None:
    found = sparsiattn.inspect(zoo.build("vit_map_pool"), strategies=[])
    assert found.skipped == (("attn_pool", SINGLE),)
    assert "left alone: attn_pool: a single query" in str(found)
    assert len(found.sites) == 2


def test_only_a_reason_where_nothing_else_attends() -> None:
    """The pooling head of a model without blocks: a call that is left, and no site."""
    found = sparsiattn.inspect(zoo._vit(class_token=False, global_pool="map", depth=0))
    assert found.sites == ()
    assert [name for name, _ in found.skipped] == ["attn_pool"]
    assert all(saving.saves is None for saving in found.strategies)


@dataclass(frozen=True)
class Faulty(Strategy):
    """Raises what no error of this library is."""

    name = "faulty"
    k: float = 0.5

    def plan(self, inputs: AttentionInputs) -> Pattern:
        raise ZeroDivisionError("by its author")


@dataclass(frozen=True)
class Demanding(Strategy):
    """Has no default budget."""

    name = "demanding"
    k: float

    def plan(self, inputs: AttentionInputs) -> Pattern:
        return Pattern.top(inputs.logits(), self.k)


@dataclass(frozen=True)
class Drawing(Strategy):
    """Draws from the global generator, as a module's first weights do."""

    name = "drawing"
    k: float = 0.5

    def planner(self, site: Site) -> Planner:
        torch.randn(3)
        return super().planner(site)

    def plan(self, inputs: AttentionInputs) -> Pattern:
        return Pattern.mask(inputs.logits() > 0)


def test_plug_ins_are_listed_and_their_faults_stop_nothing() -> None:
    model = zoo.build("vit")
    with temporary_plugin(strategies=[Faulty, Demanding, Drawing]):
        names = ["local", "faulty", "demanding", "drawing"]
        assert_untouched(model, strategies=names)
        found = sparsiattn.inspect(model, strategies=names)
    local, faulty, demanding, drawing = found.strategies
    assert local.saves
    assert faulty.reason == "ZeroDivisionError: by its author"
    assert demanding.reason.startswith("TypeError")
    assert "'k'" in demanding.reason
    # what a mask lets through, only the values tell
    assert (drawing.reason, drawing.saves) == ("", None)
    assert [site.saves["drawing"] for site in found.sites] == [None, None]
    assert ("drawing k=0.5", "?", "-") in found.strategy_table()
    assert drawing.speed is None
    assert "drawing: no expected speed: the tokens it keeps depend on the image" in str(found)
    assert "faulty" not in found.sites[0].saves


@pytest.mark.parametrize("family", ["vit", "swin"])
def test_expected_speeds_are_those_of_reports(family: str) -> None:
    """As one would type it: `patch` decides on only_if_faster."""
    model = zoo.build(family)
    found = sparsiattn.inspect(model, strategies=EVERY)
    assert found.bound == pytest.approx(found.macs / (found.macs - found.mhsa_macs))
    assert f"less than about {found.bound:.2f}x" in str(found)
    speeds = {}
    for saving in found.strategies:
        assert saving.speed_reason == ""
        if not saving.reason:
            with sparsiattn.patch(model, saving.name) as live:
                speeds[saving.name] = live.report().speed
            assert saving.speed == pytest.approx(speeds[saving.name])
            assert f"{saving.speed:.2f}x" == saving.cells()[-1]
    assert speeds["dense"] == 1.0
    assert len(found.strategy_table()) == len(speeds) + 1
    content = found.to_dict()
    assert content["bound"] == found.bound
    assert {one["name"]: one["speed"] for one in content["strategies"] if not one["reason"]} == {
        name: pytest.approx(speed) for name, speed in speeds.items()
    }
    assert found.price_source in str(found).splitlines()[-1]


def test_why_no_speed_is_expected() -> None:
    found = sparsiattn.inspect(zoo.build("vit"), strategies=["ats"])
    (saving,) = found.strategies
    assert (saving.reason, saving.saves, saving.speed) == ("", None, None)
    assert saving.cells() == ("ats keep=0.7" if saving.budget else "ats", "?", "-")
    assert "the tokens it keeps depend on the image" in str(found)


def test_strategies_by_name() -> None:
    model = zoo.build("vit")
    one = sparsiattn.inspect(model, strategies="local")
    assert [saving.name for saving in one.strategies] == ["local"]
    assert sparsiattn.inspect(model, strategies=["local", "local"]) == one
    with pytest.raises(sparsiattn.UnknownName, match="Did you mean 'local'"):
        sparsiattn.inspect(model, strategies=["loca"])


def test_text_and_json() -> None:
    found = sparsiattn.inspect(zoo.build("hiera"), strategies=["dense", "topk", "token_drop"])
    heading = found.table()[0]
    assert "keys" in heading  # where queries are pooled, keys are others than tokens
    assert heading[-1] == "topk"  # nothing to say of "dense"
    assert "share: of the model's MACs; below a strategy" in str(found)
    text = str(found)
    for site in found.sites:
        assert f"{site.name} " in text
    assert "token_drop: not for this model: Hiera" in text
    content = json.loads(json.dumps(found.to_dict()))
    assert "left" in content  # files keep the old name of ``skipped``
    assert content["mhsa_macs"] == sum(site["macs"] for site in content["sites"])
    assert {one["name"] for one in content["strategies"]} == {"dense", "topk", "token_drop"}
    assert "keys" not in sparsiattn.inspect(zoo.build("vit"), strategies=[]).table()[0]
    assert "calls" in sparsiattn.inspect(zoo.build("vit_differential"), strategies=[]).table()[0]
    with pytest.raises(FrozenInstanceError):
        found.macs = 1  # type: ignore[misc]
    assert hash(found.sites[0]) == hash(replace(found.sites[0]))


def test_shares_as_text() -> None:
    texts = [percent(share) for share in (None, 0.123, -0.0001, -0.01, 0.0)]
    assert texts == ["?", "12.3 %", "0.0 %", "-1.0 %", "0.0 %"]


def test_the_standard_library_keeps_its_module() -> None:
    assert standard.isfunction(sparsiattn.inspect)
    assert "strategies" in standard.signature(sparsiattn.inspect).parameters


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["inspect", *arguments])


def test_command_prints_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")  # names are never cut short
    result = run("test_vit", "--strategy", "local", "--strategy", "token_drop")
    assert result.exit_code == 0, result.output
    for word in ("blocks.1.attn", "head_dim", "windows", "local k=0.25", "token_drop keep=0.7"):
        assert word in result.output
    assert "connectivity" not in result.output


def test_command_writes_json_at_the_size_asked_for() -> None:
    result = run("test_vit", "--image-size", "96", "--strategy", "local", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["name"], found["input_shape"]) == ("test_vit", [1, 3, 96, 96])
    assert found["sites"][0]["grid"] == [6, 6]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["no_such_model"], "no_such_model"),
        (["test_vit", "--strategy", "no_such"], "no_such"),
        (["resnet18", "--image-size", "64"], "img_size"),
    ],
)
def test_faults_of_the_command_are_one_line(arguments: list[str], says: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 1
    assert says in result.output
    assert "Traceback" not in result.output


class Masked(nn.Module):
    """Writes and reads positions through a mask, as transformers 5.4's Idefics encoders do."""

    def __init__(self) -> None:
        super().__init__()
        self.vit = zoo.build("vit")
        self.table = nn.Embedding(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.ones(x.shape[0], 8, 8, dtype=torch.bool, device=x.device)
        ids = torch.zeros_like(mask, dtype=torch.long)
        ids[mask] = torch.arange(64, device=x.device).expand(x.shape[0], 64)[mask.flatten(1)]
        out: Tensor = self.vit(x + self.table(ids).mean((1, 2))[..., None, None])
        return out


def test_hosts_that_index_with_masks() -> None:
    model, x = Masked().eval(), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        dense = model(x)
        with sparsiattn.patch(model, "topk", k=1.0, input=x) as live:
            assert live.sites
            torch.testing.assert_close(model(x), dense)
