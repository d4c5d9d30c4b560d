"""`profile`: what kernels compute, what is said of time, the model as found, wrong inputs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import sparsiattn
from sparsiattn import InvalidOption, InvalidType, Pattern, Profile, profile
from sparsiattn.attention import Lengths
from sparsiattn.runtime import settings
from sparsiattn.strategies import finish
from sparsiattn.testing import random_inputs
from tests.support import hosts, zoo

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
        unfused = sdpa_kernel(SDPBackend.MATH)  # the other torch 2.10 does not count on CPU
        with torch.no_grad(), unfused, FlopCounterMode(display=False) as counter:
            runtime.kernels[0](inputs, pattern)
    site = found.sites[0]
    assert site.kernel == kernel
    assert site.computed.mhsa == counter.get_total_flops() // 4
    assert site.pattern.mhsa == 2 * 48 * (64 * 14 + 65 + 4 * 65)
    assert site.density == pytest.approx((64 * 10 + 65) / 65**2)
    if kernel == "sdpa":  # every pair, and the summary keys of every row
        assert site.computed.mhsa == 2 * 48 * (65 * 69 + 4 * 65)
        assert any("masks" in note and "2 sites" in note for note in found.notes)
    else:
        assert site.computed.mhsa >= site.pattern.mhsa


def test_kernels_that_no_counter_sees_say_what_they_compute(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from torch.utils._python_dispatch import _get_current_dispatch_mode

    from sparsiattn.kernels import Gather

    compute, modes = Gather.__call__, []

    def call(self: Any, inputs: Any, pattern: Any) -> Tensor:
        modes.append(_get_current_dispatch_mode())
        return compute(self, inputs, pattern)

    monkeypatch.setattr(Gather, "__call__", call)
    monkeypatch.setattr(Gather, "uncounted_macs", lambda *_: 2000)
    model = zoo.build("vit")
    with sparsiattn.patch(model, "local", k=10, kernel="gather"):
        found = profile(model, zoo.images(model, 2))
    assert [site.computed.mhsa for site in found.sites] == [1000, 1000]
    assert found.computed.total == found.pattern.total - found.pattern.mhsa + 2000
    assert modes == [None, None]


def test_a_kernel_of_unknown_operators_is_counted_by_its_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from sparsiattn.kernels import Gather

    monkeypatch.setattr(Gather, "__call__", lambda _, inputs, pattern: inputs.v)
    model = zoo.build("vit")
    with sparsiattn.patch(model, "local", k=10, kernel="gather"):
        found = profile(model, zoo.images(model))
        assert found.computed.mhsa == 2 * 2 * 48 * (64 * 14 + 65)
        monkeypatch.setattr(Gather, "work", lambda *_: None)
        monkeypatch.setattr(Gather, "speed", lambda *_: 2.0)
        found = profile(model, zoo.images(model))
        assert found.computed.mhsa == found.pattern.mhsa


def test_what_opaque_kernels_compute_by_hand() -> None:
    """Four tiles of 16 queries; a prefix key, 8 blocks of 4 keys, and 4 summary keys."""
    from sparsiattn.kernels import Flex, Triton, XFormers

    inputs = random_inputs((8, 8), tile=(4, 4), block=(2, 2))
    pattern = finish(Pattern.top(inputs.logits(), 33), inputs, background=2)
    alone = (65 + 4 * 65) * 16  # the prefix query's row, and pooling
    # prefix and summary keys fill two more blocks
    assert Flex().uncounted_macs(inputs, pattern) == 6 * (64 * 10 * 4 * 16 + alone)
    assert XFormers().uncounted_macs(inputs, pattern) == 6 * (64 * (32 + 5) * 16 + alone)
    # head dims of 8 are computed as 16, and the prefix query as a tile of 16 queries
    rows = 64 * (33 + 4) + 16 * 65
    assert Triton().uncounted_macs(inputs, pattern) == 6 * (rows * 32 + 4 * 65 * 16)
    packed = random_inputs((2, 5), batch=1, prefix=0)
    macs = XFormers().uncounted_macs(packed, Lengths(10, 10, (4, 6)))
    assert macs == 3 * (4 * 4 + 6 * 6) * 16


@pytest.mark.slow
def test_a_compiled_kernel_runs_as_it_would_uncounted() -> None:
    model = zoo.build("vit")
    x = zoo.images(model, 1)
    with sparsiattn.patch(model, k=33, kernel="flex", tile=(4, 4), block=(2, 2)) as live:
        if live.runtimes[0].kernels[0].why_unavailable():
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
    assert not has(found, "the whole model saves nothing")
    with sparsiattn.patch(model, "topk", k=0.9, kernel="reference"):
        found = profile(model, zoo.images(model))
    assert has(found, "selecting keys costs", "2 sites")
    assert has(found, "the whole model saves nothing")
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


@pytest.mark.parametrize(("times", "says"), [((1.0, 2.0), "is slower"), ((1.05, 1.0), "saves less"),
                                             ((9.0, 1.0), None)])  # fmt: skip
def test_measured_time(
    times: tuple[float, float], says: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def alternate(
        calls: dict[str, Callable[[], Any]], rounds: int, progress: object = None
    ) -> dict[str, list[float]]:
        for call in calls.values():
            call()
        return {name: [times[name != "dense"]] * rounds for name in calls}

    monkeypatch.setattr(sparsiattn.runtime.timing, "alternate", alternate)
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
    from sparsiattn.analysis.profiling.memory import peak_bytes

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
    source = None if live is None else (live.last_pass, live.image)
    before, random = copy.copy(state_of(model)), torch.get_rng_state()
    torch.backends.mha.set_fastpath_enabled(True)
    profile(model, hosts.images(1))
    assert torch.backends.mha.get_fastpath_enabled()
    assert state_of(model) == before
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.is_grad_enabled()
    assert settings.meter is None
    assert live is None or (live.last_pass, live.image) == source
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
    assert settings.meter is None


def test_a_fault_in_the_middle_leaves_no_hook() -> None:
    model = zoo.build("vit")
    model.norm = Fails()
    with sparsiattn.patch(model, "local", k=0.25):
        before = state_of(model)
        with pytest.raises(InvalidOption, match="no such thing"):
            profile(model, zoo.images(model))
        assert state_of(model) == before
    assert settings.meter is None


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
