"""Figures of the report against closed forms and the paper."""

from __future__ import annotations

import json
import math

import pytest
import timm
import torch

import sparsiattn
from sparsiattn.kernels import Gather, cost
from sparsiattn.patching import patch_quietly, report_lines
from sparsiattn.patching.estimate import dry_site, expect
from sparsiattn.strategies.connectivity import basis_cells
from sparsiattn.testing import tiny_vit
from tests.support import zoo


def model_of(name: str) -> torch.nn.Module:
    return timm.create_model(name)


@pytest.mark.parametrize(
    ("name", "gmacs"),
    [("deit_tiny_patch16_224", 1.254), ("deit_small_patch16_224", 4.599),
     ("deit_base_patch16_224", 17.564)],
)  # fmt: skip
def test_dense_macs_are_the_published_ones(name: str, gmacs: float) -> None:
    report = sparsiattn.patch(model_of(name), "dense").report()
    assert report.macs_dense / 1e9 == pytest.approx(gmacs, abs=1e-3)
    assert report.macs == report.macs_dense


def test_deit_small_mhsa_macs_by_hand() -> None:
    """The paper's dense figure, 357.7 M, and our own count of its sparse rows."""
    report = sparsiattn.patch(
        model_of("deit_small_patch16_224"), "local", k=0.1, background=2
    ).report()
    assert report.mhsa_macs_dense == 2 * 197**2 * 384 * 12
    kept = math.ceil(0.1 * 197)
    by_hand = 12 * 2 * 384 * (196 * (kept + 4) + 197 + 4 * 197)
    assert report.mhsa_macs == by_hand
    assert report.predictor_macs == 0
    assert report.macs == report.macs_dense - report.mhsa_macs_dense + by_hand


def test_predictor_macs_by_hand() -> None:
    live = sparsiattn.patch(
        model_of("deit_small_patch16_224"), "connectivity", k=0.1, scores="predictor"
    )
    basis = math.prod(basis_cells((14, 14), None, None))
    down, coefficients, up = 197 * basis * 64, 196 * basis * 64, 196 * basis * 197
    boost = 197 * 64 + 2 * 197 * basis
    assert live.report().predictor_macs == 12 * 6 * (down + coefficients + up + boost)


def test_tiles_divide_the_predictors_cost() -> None:
    alone = sparsiattn.patch(zoo.build("vit"), k=0.25, tile=1).report()
    tiled = sparsiattn.patch(zoo.build("vit"), k=0.25, tile=(4, 4)).report()
    assert tiled.predictor_macs < alone.predictor_macs / 2
    assert tiled.mhsa_macs == alone.mhsa_macs


def test_report_before_and_after_running_and_as_json() -> None:
    model = zoo.build("swin")
    live = sparsiattn.patch(model, "connectivity", k=0.25)
    before = live.report()
    with torch.no_grad():
        model(zoo.images(model))
    after = live.report()
    assert [row.kernel for row in before.sites] == [row.kernel for row in after.sites]
    assert not any(row.ran for row in before.sites)
    assert all(row.ran for row in after.sites)
    assert json.loads(json.dumps(after.to_dict()))["macs"] == after.macs
    text = str(after)
    assert all(site.name in text for site in live.sites)
    assert "not time" in text


def test_everything_left_dense_is_named() -> None:
    model = zoo.build("vit_map_pool")
    report = sparsiattn.patch(model, "topk", k=500, sites="blocks.0.*").report()
    text = str(report)
    assert "k=500 exceeds the 64 keys" in text
    assert "not selected, dense: blocks.1.attn" in text
    assert "left alone: attn_pool: a single query" in text
    sparsiattn.unpatch(model)
    slow = sparsiattn.patch(model, "topk", k=0.5, only_if_faster=True).report()
    assert all(row.kernel == "dense" and "left dense" in row.note for row in slow.sites)
    assert slow.macs == slow.macs_dense


def test_what_only_if_faster_leaves_dense_is_named_with_its_figure() -> None:
    model = zoo.build("vit")
    with sparsiattn.patch(model, k=0.25) as live:
        forced = live.report()
    with sparsiattn.patch(model, k=0.25, only_if_faster=True) as live:
        left = live.report()
        choice = expect(live.runtimes[0], None).choice
        live.runtimes[0].note_measured(3.0, choice)  # of no interest while the site is dense
        assert live.report().sites[0].measured is None
    for before, after in zip(forced.sites, left.sites, strict=True):
        assert before.expected < 1
        figure = f"{before.kernel} with planning would run at {before.expected:.2f}x of dense"
        assert after.note == f"left dense: {figure}"
        assert f"{after.name}: {after.note}" in str(left)
        assert (after.kernel, after.expected, after.planning) == ("dense", 1.0, 0.0)


def test_a_site_left_dense_elsewhere_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    live = sparsiattn.patch(zoo.build("vit"), "local", k=0.25, only_if_faster=True)
    monkeypatch.setattr(Gather, "speed", lambda *_: 50.0)
    monkeypatch.setattr(cost.Planning, "share", lambda *_: 0.0)
    note = "left dense: gather with planning would run at 50.00x of dense, which saves less time"
    assert live.report().sites[0].note.startswith(note)
    monkeypatch.setattr(cost, "SITE_SECONDS", 0.0)
    note = (
        "left dense (decided on another machine or before tuning): gather with planning would run"
    )
    assert live.report().sites[0].note.startswith(note)


def test_planning_is_part_of_the_expected_speed() -> None:
    model = zoo.build("vit")
    rows = {}
    for strategy in ("connectivity", "topk", "local"):
        with sparsiattn.patch(model, strategy, k=0.25, background=None) as live, torch.no_grad():
            before = live.report().sites[0]
            model(zoo.images(model))
            assert live.runtimes[0].last_choice is not None
            rows[strategy] = live.report().sites[0]
            assert before.planning > 0
            assert rows[strategy].planning > 0
            assert rows[strategy].expected < live.runtimes[0].last_choice.speed
    assert rows["local"].planning < rows["topk"].planning
    # an expected speed includes choosing keys: the same lists, found at another price
    assert rows["local"].expected > rows["topk"].expected


def test_the_report_says_whose_figures_it_judges_by() -> None:
    model = zoo.build("vit")
    with sparsiattn.patch(model, k=0.25) as live:
        assert "from measurements of other machines" in str(live.report())
        assert json.loads(json.dumps(live.report().to_dict()))["basis"]
    with sparsiattn.patch(model, "dense") as live:
        assert live.report().price_source == ""


def test_measured_speed_counts_more_than_expected() -> None:
    live = sparsiattn.patch(zoo.build("vit"), k=0.25)
    assert "2 sites save MACs, not time" in str(live.report())
    for runtime, ratio in zip(live.runtimes, (1.25, 0.75), strict=True):
        runtime.note_measured(ratio, expect(runtime, None).choice)
    report = live.report()
    assert [row.speed for row in report.sites] == [1.25, 0.75]
    assert "1 site saves MACs, not time" in str(report)
    assert "1.25x" in str(report)
    assert [row["measured"] for row in report.to_dict()["sites"]] == [1.25, 0.75]


def test_a_dry_run_judges_by_the_models_own_device_and_dtype() -> None:
    model = zoo.build("vit").to(torch.bfloat16)
    for strategy in ("connectivity", "local"):
        with sparsiattn.patch(model, strategy, k=0.25) as live:
            inputs = dry_site(live.runtimes[0], None)
            assert (inputs.q.dtype, inputs.q.device.type) == (torch.bfloat16, "meta")
            assert inputs.device == torch.device("cpu")


def test_only_if_faster_keeps_the_host_path_bit_for_bit() -> None:
    model = zoo.build("vit")
    x = zoo.images(model)
    with torch.no_grad():
        dense = model(x)
        with sparsiattn.patch(model, "topk", k=0.25, only_if_faster=True):
            assert torch.equal(model(x), dense)


def test_per_layer_budgets_and_schedules() -> None:
    model = zoo.build("vit")
    for k in ([0.5, 7], lambda site: (0.5, 7)[site.index]):
        with sparsiattn.patch(model, "topk", k=k) as live:
            assert [row.k for row in live.report().sites] == [0.5, 7]
    with sparsiattn.patch(model, k=0.5, schedule={"k": {"blocks.1.attn": 7}}) as live:
        assert [row.k for row in live.report().sites] == [0.5, 7]


def test_an_unknown_mask_density_is_unknown_until_it_ran() -> None:
    from dataclasses import dataclass

    @dataclass(frozen=True)
    class Positive(sparsiattn.Strategy):
        name = "positive"

        def plan(self, inputs: sparsiattn.AttentionInputs) -> sparsiattn.Pattern:
            return sparsiattn.Pattern.mask(inputs.logits() > 0)

    report = sparsiattn.patch(zoo.build("vit"), Positive()).report()
    assert report.macs is None
    assert "unknown" in str(report)


def test_a_device_without_a_fast_kernel_is_named_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Apple's MPS, which no machine of these tests has: here the CPU plays its part."""
    with patch_quietly(tiny_vit(), "connectivity", k=0.2) as patch:
        known = patch.report()
        assert known.no_fast_kernel == ""
        assert known.speed is not None
        monkeypatch.setattr(report_lines, "SERVED", frozenset({"cuda"}))
        found = patch.report()
    assert "no fast kernel for cpu" in str(found).splitlines()[0]
    assert found.speed is None  # of which nothing is known there
    assert "whole model" not in str(found)
