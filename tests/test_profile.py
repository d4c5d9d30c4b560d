"""`profile`: closed forms, published figures, torch's and fvcore's counters, nothing changed."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import astuple
from functools import cache
from typing import Any

import hosts
import pytest
import timm
import torch
import zoo
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import sparsiattn
from sparsiattn import InvalidOption, InvalidType, Pattern, Profile, profile
from sparsiattn.interception import THREAD
from sparsiattn.patterns import Lengths
from sparsiattn.planning import finish
from sparsiattn.strategies.connectivity import Connectivity
from sparsiattn.testing.hosts import random_inputs

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
    """By torch's own counter, with gradients, for which hosts run no fused operator."""
    with torch.enable_grad(), FlopCounterMode(display=False) as counter:
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
    assert found.dense == found.own == found.computed == found.paper
    assert size != "small" or round(found.mhsa_macs / 1e6, 2) == 357.66


TABLE = [(0.9, 396.8), (0.8, 360.6), (0.7, 324.6), (0.6, 290.3), (0.5, 254.2), (0.4, 218.0),
         (0.3, 183.6), (0.2, 147.5), (0.1, 111.4), (0.05, 93.3), (0.01, 78.9)]  # fmt: skip


@pytest.mark.parametrize(("k", "mega"), zoo.slow_but([TABLE[8]], *TABLE[:8], *TABLE[9:]))
def test_the_papers_table(k: float, mega: float) -> None:
    """Sparsifiner (CVPR 2023), DeiT-S: MHSA MACs, the predictor among them."""
    kept = math.ceil(k * 197)
    with sparsiattn.patch(deit("small"), k=k) as live:
        found = profile(deit("small"), image(), accounting="paper")
        report = live.report()
    assert found.mhsa_macs / 1e6 == pytest.approx(mega, abs=0.2)
    rows = 12 * 2 * 384 * (196 * kept + 197)
    assert found.paper.mhsa == rows
    assert found.predictor_macs == found.mhsa_macs - rows == 12 * (2 * 197 * 32 * 384 + 33 * 197**2)
    assert found.macs == found.macs_dense - found.mhsa_macs_dense + found.mhsa_macs
    # beside it what is really spent: four background keys, and a predictor that costs more
    assert found.own.mhsa == 12 * 2 * 384 * (196 * (kept + 4) + 197 + 4 * 197) == report.mhsa_macs
    assert found.own.predictor == report.predictor_macs > found.predictor_macs
    assert "MHSA with predictor" in str(found)


def test_the_papers_count_of_other_settings() -> None:
    model = zoo.build("vit")
    with sparsiattn.patch(model, Connectivity(k=10, basis=5, background=None)):
        found = profile(model, zoo.images(model), accounting="paper")
    assert found.paper.mhsa == 2 * 2 * 48 * (64 * 10 + 65) == found.own.mhsa
    assert found.predictor_macs == 2 * 2 * 65 * 5 * 48 + 3 * 65**2 * 11
    with sparsiattn.patch(model, "topk", k=10):  # the paper has no such planner: what ran
        found = profile(model, zoo.images(model), accounting="paper")
    assert found.predictor_macs == found.own.predictor == 2 * 65**2 * 48
    with sparsiattn.patch(model, "token_drop", keep=0.5, layers=[0]):
        found = profile(model, zoo.images(model), accounting="paper")
    assert found.predictor_macs == 0 < found.own.predictor


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
    assert found.computed == found.own  # shorter sequences are dense: nothing is padded
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
    for parts in (found.dense, found.own, found.computed, found.paper):
        assert min(astuple(parts)) >= 0
    assert sum(site.dense.mhsa for site in found.sites) == found.mhsa_macs_dense
    assert found.own.rest == found.computed.rest
    assert found.own.mlp <= found.dense.mlp
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
        if name != "connectivity" and live.blocks[0].place != "bypass":
            assert found.tokens < dense.tokens
    assert patched[0] == "connectivity"


@pytest.mark.parametrize("family", few("vit_parallel", "samvit", "swin", of=zoo.FAMILIES))
def test_families(family: str) -> None:
    model = zoo.build(family)
    # one image: tables of relative positions are made once for a batch
    check_all(model, zoo.images(model, 1))


@pytest.mark.parametrize("family", few("twins", of=zoo.HIERARCHIES))
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
    assert found.sites[1].own.mhsa == round(sum(2 * n * n * 48 for n in left) / 3)
    assert found.sites[1].density == 1.0
    assert found.computed.mhsa == found.own.mhsa


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
        assert part.mhsa_macs == found.sites[0].own.mhsa
        assert part.dense.projections == found.sites[0].dense.projections
        assert part.macs_dense == part.mhsa_macs_dense + 12 * 65 * 48**2
        with pytest.raises(InvalidOption, match="latency"):
            profile(whole, x, latency=True)


# -- what kernels compute --


@pytest.mark.parametrize("kernel", ["sdpa", "reference", "gather"])
@pytest.mark.parametrize("tile", [1, (4, 4)])
def test_computed_is_what_the_kernel_runs(kernel: str, tile: Any) -> None:
    model = zoo.build("vit")
    x = zoo.images(model, 2)
    calls: list[Any] = []
    with sparsiattn.patch(model, "local", k=10, kernel=kernel, tile=tile, background=2) as live:
        found = profile(model, x)
        with torch.no_grad(), live.observing(lambda *seen: calls.append(seen)):
            model(x)
        runtime, (_, planner, inputs) = live.runtimes[0], calls[0]
        pattern = runtime.finish(planner(inputs), inputs)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            runtime.kernels[0](inputs, pattern)
    site = found.sites[0]
    assert site.kernel == kernel
    assert site.computed.mhsa == counter.get_total_flops() // 4
    assert site.own.mhsa == 2 * 48 * (64 * 14 + 65 + 4 * 65)
    assert site.density == pytest.approx((64 * 10 + 65) / 65**2)
    if kernel == "sdpa":  # every pair, and the summary keys of every row
        assert site.computed.mhsa == 2 * 48 * (65 * 69 + 4 * 65)
        assert any("masks" in note and "2 sites" in note for note in found.notes)
    else:
        assert site.computed.mhsa >= site.own.mhsa


def test_kernels_that_no_counter_sees_say_what_they_compute(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from torch.utils._python_dispatch import _get_current_dispatch_mode

    from sparsiattn.kernels.gather import Gather

    compute, modes = Gather.__call__, []

    def call(self: Any, inputs: Any, pattern: Any) -> Tensor:
        modes.append(_get_current_dispatch_mode())
        return compute(self, inputs, pattern)

    monkeypatch.setattr(Gather, "__call__", call)
    monkeypatch.setattr(Gather, "hidden_macs", lambda *_: 2000)
    model = zoo.build("vit")
    with sparsiattn.patch(model, "local", k=10, kernel="gather"):
        found = profile(model, zoo.images(model, 2))
    assert [site.computed.mhsa for site in found.sites] == [1000, 1000]
    assert found.computed.total == found.own.total - found.own.mhsa + 2000
    assert modes == [None, None]


def test_a_kernel_of_unknown_operators_is_counted_by_its_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from sparsiattn.kernels.gather import Gather

    monkeypatch.setattr(Gather, "__call__", lambda _, inputs, pattern: inputs.v)
    model = zoo.build("vit")
    with sparsiattn.patch(model, "local", k=10, kernel="gather"):
        found = profile(model, zoo.images(model))
        assert found.computed.mhsa == 2 * 2 * 48 * (64 * 14 + 65)
        monkeypatch.setattr(Gather, "work", lambda *_: None)
        monkeypatch.setattr(Gather, "speed", lambda *_: 2.0)
        found = profile(model, zoo.images(model))
        assert found.computed.mhsa == found.own.mhsa


def test_what_opaque_kernels_compute_by_hand() -> None:
    """Four tiles of 16 queries; a prefix key, 8 blocks of 4 keys, and 4 summary keys."""
    from sparsiattn.kernels.blocksparse import Triton
    from sparsiattn.kernels.flex import Flex
    from sparsiattn.kernels.fmha import XFormers

    inputs = random_inputs((8, 8), tile=(4, 4), block=(2, 2))
    pattern = finish(Pattern.top(inputs.logits(), 33), inputs, background=2)
    alone = (65 + 4 * 65) * 16  # the prefix query's row, and pooling
    # prefix and summary keys fill two more blocks
    assert Flex().hidden_macs(inputs, pattern) == 6 * (64 * 10 * 4 * 16 + alone)
    assert XFormers().hidden_macs(inputs, pattern) == 6 * (64 * (32 + 5) * 16 + alone)
    # head dims of 8 are computed as 16
    assert Triton().hidden_macs(inputs, pattern) == 6 * (64 * (33 + 4) * 32 + alone)
    packed = random_inputs((2, 5), batch=1, prefix=0)
    macs = XFormers().hidden_macs(packed, Lengths(10, 10, (4, 6)))
    assert macs == 3 * (4 * 4 + 6 * 6) * 16


@pytest.mark.slow
def test_a_compiled_kernel_runs_as_it_would_uncounted() -> None:
    model = zoo.build("vit")
    x = zoo.images(model, 1)
    with sparsiattn.patch(model, k=33, kernel="flex", tile=(4, 4), block=(2, 2)) as live:
        if live.runtimes[0].kernels[0].unavailable():
            pytest.skip("no compiler for FlexAttention here")
        found = profile(live.warmup(x).model, x)
    assert found.sites[0].computed.mhsa == 2 * 48 * (64 * 10 * 4 + 65 + 4 * 65)


# -- words --


def has(found: Profile, *words: str) -> bool:
    return any(all(word in note for word in words) for note in found.notes)


def test_where_macs_are_not_time() -> None:
    model = zoo.build("vit")
    with sparsiattn.patch(model, "local", k=0.1):
        found = profile(model, zoo.images(model))
    assert has(found, "2 sites save MACs, not time")
    assert all(site.speed is not None and site.speed < 1 for site in found.sites)
    assert not has(found, "in all nothing is saved")
    with sparsiattn.patch(model, "topk", k=0.9, kernel="reference"):
        found = profile(model, zoo.images(model))
    assert has(found, "choosing keys costs", "2 sites")
    assert has(found, "in all nothing is saved")
    assert found.macs > found.macs_dense


def test_a_small_share_of_attention_is_named() -> None:
    model = timm.models.VisionTransformer(**{**zoo.TINY, "embed_dim": 192}).eval()
    share = 2 * 2 * 65**2 * 192
    with sparsiattn.patch(model, "local", k=0.1):
        found = profile(model, zoo.images(model))
    assert found.mhsa_macs_dense == share < 0.15 * found.macs_dense
    assert has(found, f"{100 * share / found.macs_dense:.1f} %", "fewer tokens")


def test_sites_left_dense_are_named() -> None:
    model = zoo.build("vit")
    with sparsiattn.patch(model, "local", k=0.5, only_if_faster=True):
        found = profile(model, zoo.images(model))
    assert all(site.left_dense and site.kernel == "dense" for site in found.sites)
    assert has(found, "2 sites left dense")
    assert found.macs == found.macs_dense


@pytest.mark.parametrize(("times", "says"), [((1.0, 2.0), "is slower"), ((1.05, 1.0), "gains less"),
                                             ((9.0, 1.0), None)])  # fmt: skip
def test_measured_time(
    times: tuple[float, float], says: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def alternate(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
        for call in calls.values():
            call()
        return {name: [times[name != "dense"]] * rounds for name in calls}

    monkeypatch.setattr(sparsiattn.timing, "alternate", alternate)
    model = zoo.build("vit")
    x = zoo.images(model)
    plain = profile(model, x, latency=True, rounds=2)
    assert plain.latency is not None
    assert (plain.latency.dense_ms, plain.latency.ratio) == (1e3 * times[0], None)
    with sparsiattn.patch(model, "hybrid", attention="local", k=0.25, keep=0.5, layers=[0],
                          only_if_faster=False):  # fmt: skip
        found = profile(model, x, latency=True, rounds=2)
    assert found.latency is not None
    assert found.latency.ratio == times[0] / times[1]
    assert [site.measured for site in found.sites] == [times[0] / times[1]] * 2
    assert has(found, "measured:", says or "") == (says is not None)
    assert "one forward pass" in str(found)


@pytest.mark.filterwarnings("ignore::UserWarning")  # of a profiler without the GPU it looks for
def test_peak_memory() -> None:
    from sparsiattn.memory import peak_bytes

    def call() -> None:
        held = [torch.ones(1 << 18) for _ in range(3)]
        del held[1:]
        torch.ones(1 << 17).sum()

    assert 3 << 20 <= peak_bytes(call, torch.device("cpu")) < 4 << 20
    model = zoo.build("vit")
    with sparsiattn.patch(model, "local", k=0.25, kernel="reference"):
        found = profile(model, zoo.images(model), memory=True)
    assert found.memory is not None
    assert 0 < found.memory.dense < found.memory.patched
    assert "peak memory" in str(found)


# -- as found --


def state_of(model: nn.Module) -> Any:
    hooks = [
        {name: dict(value) for name, value in vars(module).items() if "hook" in name and value}
        for module in model.modules()
    ]
    return (
        [(module.training, type(module), sorted(vars(module))) for module in model.modules()],
        hooks,
        [(name, value._version, value.data_ptr()) for name, value in model.state_dict().items()],
    )


@pytest.mark.parametrize("patched", [False, True])
def test_the_model_is_left_as_found(patched: bool) -> None:
    model = nn.Sequential(hosts.build("encoder"), nn.BatchNorm1d(64)).train()
    model[0].encoder.layers[1].eval()
    x = hosts.images(2)
    live = sparsiattn.patch(model, "local", k=0.25, input=(1, 3, 32, 32)) if patched else None
    model(x).sum().backward()
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    source = None if live is None else (live.carried, live.image)
    before, random = copy.copy(state_of(model)), torch.get_rng_state()
    torch.backends.mha.set_fastpath_enabled(True)
    profile(model, hosts.images(1))
    assert torch.backends.mha.get_fastpath_enabled()
    assert state_of(model) == before
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.is_grad_enabled()
    assert THREAD.meter is None
    assert live is None or (live.carried, live.image) == source
    for parameter, grad in zip(model.parameters(), grads, strict=True):
        assert (grad is None) == (parameter.grad is None)
        assert grad is None or torch.equal(grad, parameter.grad)


def test_what_the_last_forward_pass_left_stays() -> None:
    model = zoo.build("vit")
    with sparsiattn.patch(model, "token_drop", keep=0.5, layers=[0]) as live, torch.no_grad():
        out = model(zoo.images(model, 1))
        source = live.source()
        profile(model, zoo.images(model, 4))
        assert torch.equal(live.source(), source)
        assert torch.equal(model(zoo.images(model, 1)), out)


def test_compiled_and_parallel_models_are_counted_eagerly() -> None:
    model = zoo.build("vit")
    expected = profile(model, zoo.images(model))
    assert profile(torch.compile(model), zoo.images(model)) == expected
    assert profile(nn.DataParallel(model), zoo.images(model)) == expected


class Fails(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.is_meta:
            return x
        raise RuntimeError("no such thing")


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        ((1, 3, 32, 32), InvalidType, r"torch\.randn"),
        (torch.randn, InvalidType, "an image tensor"),
        (None, InvalidType, "NoneType"),
        ({}, InvalidType, "at least one tensor"),
        (torch.zeros(0, 3, 32, 32), InvalidOption, "at least one image"),
        (torch.zeros(1, 3, 40, 40), sparsiattn.SparsiattnError, "40"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.float64), InvalidOption, "fails on this input"),
    ],
)
def test_wrong_inputs(given: Any, error: type[Exception], says: str) -> None:
    model = zoo.build("vit")
    before = state_of(model)
    with pytest.raises(error, match=says):
        profile(model, given)
    assert state_of(model) == before
    assert THREAD.meter is None


def test_a_fault_in_the_middle_leaves_no_hook() -> None:
    model = zoo.build("vit")
    model.norm = Fails()
    with sparsiattn.patch(model, "local", k=0.25):
        before = state_of(model)
        with pytest.raises(InvalidOption, match="no such thing"):
            profile(model, zoo.images(model))
        assert state_of(model) == before
    assert THREAD.meter is None


def test_wrong_options() -> None:
    model = zoo.build("vit")
    x = zoo.images(model)
    wrong: Any = "papers"
    with pytest.raises(InvalidOption, match="paper"):
        profile(model, x, accounting=wrong)
    with pytest.raises(InvalidOption, match="rounds"):
        profile(model, x, latency=True, rounds=0)
    with pytest.raises(InvalidType, match=r"torch\.nn\.Module"):
        profile(wrong, x)
    with sparsiattn.patch(model, k=0.5) as live:
        with live.disabled(), pytest.raises(InvalidOption, match="disabled"):
            profile(model, x)
        with pytest.raises(InvalidOption, match="rounds"):
            profile(model, x, latency=True, rounds=0)
