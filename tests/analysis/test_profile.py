"""`profile`: closed forms, published figures, torch's and fvcore's counters, nothing changed."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import astuple
from functools import cache
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import sparsiattn
from sparsiattn import InvalidOption, Profile, profile
from sparsiattn.strategies import Connectivity
from tests.support import hosts, zoo

WIDTH = {"tiny": 192, "small": 384, "base": 768}
PATTERNS: list[tuple[str, dict[str, Any]]] = [
    ("connectivity", {"k": 0.25}),
    ("token_drop", {"keep": 0.5, "layers": [0]}),
    ("hybrid", {"k": 0.25, "keep": 0.5, "layers": [0], "only_if_faster": False}),
]


@cache
def deit(size: str) -> nn.Module:
    return timm.create_model(f"deit_{size}_patch16_224").eval()


def image(batch: int = 1, side: int = 224) -> Tensor:
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(3))


def raw_macs(model: nn.Module, *args: Any, **kwargs: Any) -> int:
    """By torch's own counter, with gradients, for which hosts run no fused operator, and without
    fused attention, which it leaves out on CPU in torch 2.10."""
    unfused = sdpa_kernel(SDPBackend.MATH)
    with torch.enable_grad(), unfused, FlopCounterMode(display=False) as counter:
        model(*args, **kwargs)
    return counter.get_total_flops() // 2


# -- published figures and closed forms --


@pytest.mark.parametrize(
    ("size", "giga"), zoo.slow_but([("small", 4.599)], ("tiny", 1.254), ("base", 17.564))
)
def test_deit_dense(size: str, giga: float) -> None:
    model, c, n = deit(size), WIDTH[size], 197
    found = profile(model, image())
    assert round(found.macs_dense / 1e9, 3) == giga
    assert found.macs == found.macs_dense == raw_macs(model, image())
    assert found.mhsa_macs == found.mhsa_macs_dense == 12 * 2 * n * n * c
    assert found.dense.projections == 12 * 4 * n * c * c
    assert found.dense.mlp == 12 * 8 * n * c * c
    assert found.dense.rest == 196 * 768 * c + 1000 * c
    assert found.tokens == (n,) * 12
    assert found.predictor_macs == 0
    assert found.dense == found.pattern == found.computed == found.paper
    assert size != "small" or round(found.mhsa_macs / 1e6, 2) == 357.66


TABLE = [(0.9, 396.8), (0.8, 360.6), (0.7, 324.6), (0.6, 290.3), (0.5, 254.2), (0.4, 218.0),
         (0.3, 183.6), (0.2, 147.5), (0.1, 111.4), (0.05, 93.3), (0.01, 78.9)]  # fmt: skip


@pytest.mark.parametrize(("k", "mega"), zoo.slow_but([TABLE[8]], *TABLE[:8], *TABLE[9:]))
def test_the_papers_table(k: float, mega: float) -> None:
    """Sparsifiner (CVPR 2023), DeiT-S: MHSA MACs, the predictor among them."""
    kept = math.ceil(k * 197)
    options = {"scores": "predictor", "background": 2}
    with sparsiattn.patch(deit("small"), k=k, **options) as live:
        found = profile(deit("small"), image(), accounting="paper")
        report = live.report()
    assert found.mhsa_macs / 1e6 == pytest.approx(mega, abs=0.2)
    rows = 12 * 2 * 384 * (196 * kept + 197)
    assert found.paper.mhsa == rows
    assert found.predictor_macs == found.mhsa_macs - rows == 12 * (2 * 197 * 32 * 384 + 33 * 197**2)
    assert found.macs == found.macs_dense - found.mhsa_macs_dense + found.mhsa_macs
    # beside it what is really spent: four background keys, and a predictor that costs more
    assert (
        found.pattern.mhsa == 12 * 2 * 384 * (196 * (kept + 4) + 197 + 4 * 197) == report.mhsa_macs
    )
    assert found.pattern.predictor == report.predictor_macs > found.predictor_macs
    assert "MHSA with predictor" in str(found)


def test_the_papers_count_of_other_settings() -> None:
    model = zoo.build("vit")
    with sparsiattn.patch(model, Connectivity(k=10, basis=5, background=None)):
        found = profile(model, zoo.images(model), accounting="paper")
    assert found.paper.mhsa == 2 * 2 * 48 * (64 * 10 + 65) == found.pattern.mhsa
    assert found.predictor_macs == 2 * 2 * 65 * 5 * 48 + 3 * 65**2 * 11
    with sparsiattn.patch(model, "topk", k=10):  # the paper has no such planner: what ran
        found = profile(model, zoo.images(model), accounting="paper")
    assert found.predictor_macs == found.pattern.predictor == 2 * 65**2 * 48
    with sparsiattn.patch(model, "token_drop", keep=0.5, layers=[0]):
        found = profile(model, zoo.images(model), accounting="paper")
    assert found.predictor_macs == 0 < found.pattern.predictor


@pytest.mark.parametrize(("keep", "mega"), zoo.slow_but([(0.7, 193.18)], (0.5, 148.60)))
def test_evit_on_deit_s(keep: float, mega: float) -> None:
    """Figures of strategies' acceptance checks: no fused token, 0-based layers 3, 6 and 9."""
    with sparsiattn.patch(deit("small"), "token_drop", keep=keep) as live:
        found, report = profile(deit("small"), image()), live.report()
    counts, n = [], 196
    for layer in range(12):
        counts.append(1 + n)
        n = math.ceil(keep * n) if layer in (3, 6, 9) else n
    assert found.tokens == tuple(counts)
    assert round(found.mhsa_macs / 1e6, 2) == mega
    assert found.computed == found.pattern  # shorter sequences are dense: nothing is padded
    assert (found.macs, found.predictor_macs) == (report.macs, report.predictor_macs)
    assert found.macs_dense == report.macs_dense
    assert not found.notes


def few(*usual: str, of: Iterable[str]) -> list[Any]:
    """All of them, most of them slow."""
    return zoo.slow_but(usual, *(name for name in of if name not in usual))


# -- every family --


def check(model: nn.Module, given: Any, macs: float, report: sparsiattn.Report | None) -> Profile:
    """What holds for every model and patch; with a report of the same shapes, its figures."""
    found = profile(model, given)
    assert found.macs_dense == round(macs / found.images)
    for parts in (found.dense, found.pattern, found.computed, found.paper):
        assert min(astuple(parts)) >= 0
    assert sum(site.dense.mhsa for site in found.sites) == found.mhsa_macs_dense
    assert found.pattern.rest == found.computed.rest
    assert found.pattern.mlp <= found.dense.mlp
    assert len(found.tokens) == len(found.sites)
    assert json.loads(json.dumps(found.to_dict()))["macs"] == found.macs
    assert all(site.name in str(found) for site in found.sites)
    if report is not None and report.macs is not None:
        assert found.mhsa_macs_dense == report.mhsa_macs_dense
        assert found.mhsa_macs == report.mhsa_macs
        assert found.macs == pytest.approx(report.macs, abs=2)
        assert found.predictor_macs == pytest.approx(report.predictor_macs, abs=2)
    return found


def check_all(model: nn.Module, x: Tensor) -> None:
    macs = raw_macs(model, x)
    dense = check(model, x, macs, None)
    assert dense.macs == dense.macs_dense
    assert dense.sites
    patched = []
    for name, options in PATTERNS:
        try:
            live = sparsiattn.patch(model, name, input=(1, *x.shape[1:]), **options)
        except sparsiattn.SparsiattnError:
            continue  # some hosts keep all tokens
        with live:
            found = check(model, x, macs, live.report())
            patched.append(name)
        if name != "connectivity" and live.blocks[0].placement != "bypass":
            assert found.tokens < dense.tokens
    assert patched[0] == "connectivity"


@pytest.mark.parametrize("family", few("vit_parallel", "swin", of=zoo.FAMILIES))
def test_families(family: str) -> None:
    model = zoo.build(family)
    # one image: tables of relative positions are made once for a batch
    check_all(model, zoo.images(model, 1))


@pytest.mark.parametrize("family", few(of=zoo.HIERARCHIES))
def test_hierarchies(family: str) -> None:
    check_all(zoo.build(family), image(1, zoo.HIERARCHIES[family][1]))


@pytest.mark.parametrize("name", few("encoder", of=hosts.HOSTS))
def test_hosts(name: str) -> None:
    check_all(hosts.build(name), hosts.images(1))


def test_keyword_arguments_and_batches() -> None:
    model = hosts.build("vit")
    one = profile(model, {"pixel_values": hosts.images(1)})
    three = profile(model, {"pixel_values": hosts.images(3), "return_dict": True})
    assert (one.macs, one.tokens) == (three.macs, three.tokens)
    assert (one.images, three.images) == (1, 3)
    assert profile(model, (hosts.images(2),)).macs == profile(model, [hosts.images(2)]).macs


def test_another_resolution_than_patched_for() -> None:
    model = timm.models.VisionTransformer(**{**zoo.TINY, "dynamic_img_size": True}).eval()
    with sparsiattn.patch(model, "local", k=10):
        found = profile(model, image(1, 64))
    assert found.tokens == (257, 257)
    assert found.mhsa_macs_dense == 2 * 2 * 257**2 * 48
    assert found.mhsa_macs == 2 * 2 * 48 * (256 * 14 + 257 + 4 * 257)


def test_fvcore_agrees() -> None:
    analysis = pytest.importorskip("fvcore.nn")
    model = zoo.build("vit_unfused")  # fvcore does not know fused attention
    counter = analysis.FlopCountAnalysis(model, zoo.images(model, 1))
    counter.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    found = profile(model, zoo.images(model, 1))
    norms = counter.by_operator()["layer_norm"]  # five operations an element, none of them a MAC
    assert counter.total() - norms == found.macs_dense
    assert counter.by_module()["blocks.0.mlp"] == found.sites[0].dense.mlp


def test_adaptive_counts_are_means_over_images() -> None:
    model = zoo.build("vit")
    with sparsiattn.patch(model, "token_drop", keep="adaptive", layers=[0]) as live:
        assert live.report().macs is None
        found = profile(model, zoo.images(model, 3))
        with torch.no_grad():
            model(zoo.images(model, 3))
        left = (live.source() >= 0).sum(1).tolist()
    assert found.tokens == (65, round(sum(left) / 3))
    assert found.sites[1].pattern.mhsa == round(sum(2 * n * n * 48 for n in left) / 3)
    assert found.sites[1].density == 1.0
    assert found.computed.mhsa == found.pattern.mhsa


def test_models_without_attention_have_no_sites() -> None:
    model = timm.create_model("resnet18").eval()
    found = profile(model, image(1, 64))
    assert found.macs_dense == raw_macs(model, image(1, 64)) == found.dense.rest
    assert found.sites == () == found.tokens


class Wrapped(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body, self.head = body, nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def test_a_patch_on_a_part_of_the_model() -> None:
    body = zoo.build("vit")
    whole, x = Wrapped(body).eval(), zoo.images(body, 1)
    before = profile(whole, x)
    with sparsiattn.patch(body, "local", k=10) as live:
        found = profile(whole, x)
        assert found.dense == before.dense
        assert found.mhsa_macs == live.report().mhsa_macs
        assert [site.name for site in found.sites] == ["body.blocks.0.attn", "body.blocks.1.attn"]
        tokens = torch.randn(1, 65, 48)
        part = profile(body.get_submodule("blocks.0"), tokens)
        assert part.mhsa_macs == found.sites[0].pattern.mhsa
        assert part.dense.projections == found.sites[0].dense.projections
        assert part.macs_dense == part.mhsa_macs_dense + 12 * 65 * 48**2
        with pytest.raises(InvalidOption, match="latency"):
            profile(whole, x, latency=True)


def test_old_names() -> None:
    """Files keep the key ``own``; the attribute warns."""
    model = zoo.build("vit")
    with sparsiattn.patch(model, "local", k=0.25):
        found = profile(model, zoo.images(model))
    with pytest.warns(DeprecationWarning, match="pattern"):
        assert found.own == found.pattern
    with pytest.warns(DeprecationWarning, match="pattern"):
        assert found.sites[0].own == found.sites[0].pattern
    data = found.to_dict()
    assert data["own"]["mhsa"] == found.pattern.mhsa
    assert "pattern" not in data
    assert "pattern" not in data["sites"][0]
