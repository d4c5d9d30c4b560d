"""Prices of GPUs that nobody measured: from data sheets, marked so, and what ``auto`` does."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import timm
import torch

import sparsiattn
from sparsiattn import AttentionInputs, Pattern, Site
from sparsiattn.analysis.benchmark import tuning
from sparsiattn.attention import Lengths
from sparsiattn.kernels import CallShape, Kernel, choose, cost, gpu_prices
from sparsiattn.kernels.gpu_prices import GPUS, recognise
from sparsiattn.kernels.prices import DENSE, Prices
from sparsiattn.patching.break_even import images_needed, scientific
from sparsiattn.patching.estimate import Expected, expect
from sparsiattn.registry import REGISTRY
from sparsiattn.strategies import finish
from tests.support.fake_gpu import CUDA, planned_for_gpu

BY_NAME = {gpu.name: gpu for gpu in GPUS}
ON_GPU = ("triton", "flex", "xformers")

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


def call_of(
    tokens: int = 4096, *, k: float = 0.1, tile: Any = (8, 8), batch: int = 1, block: Any = (8, 8)
) -> tuple[AttentionInputs, Pattern]:
    """A call in bfloat16 that a GPU would run: tensors without data, and the device by name."""
    q = torch.empty(batch, 6, tokens, 64, device="meta", dtype=torch.bfloat16)
    inputs = AttentionInputs(
        q, q, q, 0.125, None, Site.of(q, q, q), tile=tile, block=block, target_device=CUDA
    )
    assert inputs.tiles is not None
    scores = Pattern.top(q.new_empty(batch, 6, inputs.tiles.count, tokens), k)
    return inputs, finish(scores, inputs)


@pytest.fixture
def h200() -> Iterator[None]:
    with planned_for_gpu("NVIDIA H200"):
        yield


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
def test_peaks_of_one_gpu_agree_with_each_other(gpu: gpu_prices.GPU) -> None:
    """Float32 units do one fused multiply-add a clock: 64 a processor on an A100, else 128."""
    units = 64 if gpu.capability == (8, 0) else 128
    assert gpu.single == pytest.approx(2 * units * gpu.processors * gpu.clock, rel=0.02)


@pytest.mark.parametrize(("dim", "least", "most"), [(64, 373, 497), (128, 574, 648)])
def test_dense_attention_of_an_h100_is_near_the_published_rate(
    dim: int, least: float, most: float
) -> None:
    """FLOP/s of cuDNN and of FlashAttention-3 at 1,024 to 16,384 tokens (arXiv 2407.08608)."""
    call = CallShape(4, 16, 8192, 8192, dim, dim, torch.bfloat16, CUDA)
    seconds = gpu_prices._TABLES["H100", 2][DENSE].of(call.dense)
    assert 0.9 * least < 2 * call.dense.macs / seconds / 1e12 < 1.1 * most


@pytest.mark.parametrize(
    ("name", "capability", "used", "guessed"),
    [
        ("NVIDIA H200", (9, 0), "H200", False),
        ("NVIDIA H100 80GB HBM3", (9, 0), "H100", False),
        ("NVIDIA H100 PCIe", (9, 0), "H100 PCIe", False),
        ("NVIDIA H100 NVL", (9, 0), "H100", True),
        ("NVIDIA A100-SXM4-80GB", (8, 0), "A100", False),
        ("NVIDIA A100-SXM4-40GB", (8, 0), "A100 40 GB", False),
        ("NVIDIA GeForce RTX 4090", (8, 9), "RTX 4090", False),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", (8, 9), "RTX 4090", True),
        ("NVIDIA L4", (8, 9), "RTX 4090", True),
        ("NVIDIA A10G", (8, 6), "RTX 4090", True),
        ("NVIDIA B200", (10, 0), "H100", True),
        ("NVIDIA GeForce RTX 5090", (12, 0), "RTX 4090", True),
        ("Tesla T4", (7, 5), "A100", True),
    ],
)
def test_a_gpu_gets_its_own_prices_or_those_of_the_nearest(
    name: str, capability: tuple[int, int], used: str, guessed: bool
) -> None:
    known = recognise(name, capability)
    assert known.gpu is BY_NAME[used]
    assert bool(known.guess) == guessed
    assert known.origin.startswith(f"NVIDIA's data sheet of the {used}")
    assert (f"a guess: the {name}" in known.origin or f"the {name}" in known.origin) == guessed


def test_without_a_gpu_the_usual_one_is_assumed_and_that_is_a_guess() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    text = cost.estimated_from(CUDA, torch.bfloat16)
    assert text == "NVIDIA's data sheet of the H100, a guess: no GPU can be seen here"
    assert cost.estimated_from(torch.device("cpu"), torch.bfloat16) == ""


@pytest.mark.usefixtures("h200")
@pytest.mark.parametrize("name", ON_GPU)
def test_kernels_of_gpus_count_their_work(name: str) -> None:
    kernel = REGISTRY.get("kernels", name)
    for batch in (1, 8):
        inputs, pattern = call_of(batch=batch)
        work = kernel.work(inputs, pattern)
        assert work.macs >= 0.1 * CallShape.of(inputs).dense.macs, "no pair is left out"
        price = cost.prices(name, CallShape.of(inputs))
        expected = cost.dense_seconds(CallShape.of(inputs)) / price.of(work)
        assert kernel.speed(inputs, pattern) == pytest.approx(expected)
    one, eight = (kernel.work(*call_of(batch=batch)) for batch in (1, 8))
    assert one.times(8).features() == pytest.approx(eight.features())
    fewer, more = (kernel.work(*call_of(k=k)).macs for k in (0.1, 0.25))
    assert fewer < more


@pytest.mark.usefixtures("h200")
def test_work_of_triton_by_hand() -> None:
    """Tiles of 49 queries are computed as 64; 200 queries in two programs that read keys twice."""
    triton = REGISTRY.get("kernels", "triton")
    inputs, pattern = call_of(196, k=0.25, tile=(7, 7), block=1)
    work = triton.work(inputs, pattern)
    assert (work.macs, work.logits) == (6 * 4 * 64 * 49 * 128, 6 * 4 * 64 * 49)
    assert work.bytes == 6 * 4 * 49 * 128 * 2
    inputs, pattern = call_of(1600, k=100, tile=(20, 10), block=1)
    assert triton.work(inputs, pattern).bytes == 6 * 8 * 2 * 100 * 128 * 2


@pytest.mark.usefixtures("h200")
def test_ragged_kernels_pay_for_each_image() -> None:
    q = torch.empty(1, 6, 300, 64, device="meta", dtype=torch.bfloat16)
    inputs = AttentionInputs(q, q, q, 0.125, None, Site.of(q, q, q), target_device=CUDA)
    pattern = Lengths(300, 300, (100, 200))
    assert REGISTRY.get("kernels", "xformers").work(inputs, pattern).logits == 6 * (100**2 + 200**2)


class Ready(Kernel):
    """Another kernel as it is when it has been compiled and every package is there."""

    def __init__(self, kernel: Kernel) -> None:
        self.name, self.work = kernel.name, kernel.work  # type: ignore[misc, method-assign]

    def why_not(self, inputs: AttentionInputs, pattern: Pattern) -> list[str]:
        return []


@pytest.mark.parametrize("gpu", ["NVIDIA H200", "NVIDIA A100-SXM4-80GB", "NVIDIA GeForce RTX 4090"])
def test_auto_ranks_by_these_prices(gpu: str) -> None:
    """Reading keys in place beats gathering them, and pages that 16 queries at a time read."""
    with planned_for_gpu(gpu):
        names = ("gather", "sdpa", *ON_GPU)
        kernels = [Ready(REGISTRY.get("kernels", name)) for name in names]
        inputs, pattern = call_of(batch=8)
        choice = choose(kernels, inputs, pattern, explicit=False)
        assert choice.kernel.name == "triton"
        speeds = {kernel.name: kernel.speed(inputs, pattern) for kernel in kernels}
        assert 1 < speeds["triton"] < 10
        assert min(speeds.values()) == speeds["sdpa"]
        inputs, pattern = call_of(batch=8, block=(4, 4))
        small = {kernel.name: kernel.speed(inputs, pattern) for kernel in kernels}
        assert small["flex"] < speeds["flex"], "small blocks leave tensor cores idle"


@pytest.mark.usefixtures("h200")
def test_tune_names_what_stays_an_estimate() -> None:
    measured = {name: Prices(1.0, 1.0, 1.0, 1.0) for name in ("dense", "planning", "triton")}
    (line,) = tuning._estimates(CUDA, {"bfloat16": measured})
    start = "bfloat16: not measured, estimated from NVIDIA's data sheet of the H200: "
    assert set(line.removeprefix(start).split(", ")) == (
        {"reference", "sdpa", "gather", "varlen", "flex", "xformers", "flash_attn_4", "natten"}
    )
    everything = dict.fromkeys(cost.shipped(CUDA, torch.float32), measured["dense"])
    assert not list(tuning._estimates(CUDA, {"bfloat16": everything}))
    assert not list(tuning._estimates(torch.device("cpu"), {"bfloat16": measured}))


@pytest.mark.usefixtures("h200")
def test_float32_is_no_faster_than_half_precision() -> None:
    inputs, _ = call_of()
    half = CallShape.of(inputs)
    single = replace(half, dtype=torch.float32)
    for name, price in cost.shipped(CUDA, torch.bfloat16).items():
        for work in (half.dense, replace(half.dense, bytes=1e6)):
            assert price.of(work) <= cost.prices(name, single).of(work), name


# -- patches planned for a GPU --------------------------------------------------------------------


@cache
def _source(size: int) -> Any:
    options = {"img_size": size, "depth": 1}
    return timm.create_model("deit_small_patch16_224", **options).eval().bfloat16()


def patched(size: int, **options: Any) -> tuple[list[str], sparsiattn.Report, Any]:
    """Warnings and report of a patch, and the kernel that runs at its first site."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", sparsiattn.SlowerThanDense)
        with sparsiattn.patch(_source(size), "connectivity", k=0.1, **options) as patch:
            report = patch.report()
            expected = expect(patch.runtimes[0], None)
    return [str(warning.message) for warning in caught], report, expected


@pytest.mark.usefixtures("h200")
def test_deit_at_224_px_is_sparse_as_asked_and_says_to_drop_tokens() -> None:
    (told,), report, expected = patched(224)
    assert "(estimated from NVIDIA's data sheet of the H200); try strategy='token_drop'" in told
    assert "strategy='token_merge'" in told
    assert expected.choice.kernel.name not in ("dense", "reference")
    assert all(site.kernel == expected.choice.kernel.name for site in report.sites)
    assert all(site.density is not None and site.density < 0.12 for site in report.sites)
    lines = str(report).splitlines()
    assert any("expected speeds are estimates from NVIDIA's data sheet of the H200" in line
               for line in lines)  # fmt: skip
    assert report.price_source in lines


@pytest.mark.usefixtures("h200")
def test_sites_that_lose_time_stay_dense_where_that_is_asked() -> None:
    told, report, _ = patched(224, only_if_faster=True)
    assert not told
    assert [site.kernel for site in report.sites] == ["dense"]


def test_a_guess_is_called_a_guess() -> None:
    with planned_for_gpu("NVIDIA L4", (8, 9)):
        (told,), report, _ = patched(224)
    for text in (told, report.price_source):
        assert "RTX 4090, a guess: the NVIDIA L4 has compute capability 8.9, too" in text


def test_break_even_is_where_the_same_prices_say_that_times_are_equal() -> None:
    """The oracle prices the call itself, at batch sizes around the one that is found."""
    found = {}
    for gpu in ("NVIDIA H200", "NVIDIA A100-SXM4-80GB", "NVIDIA GeForce RTX 4090"):
        with planned_for_gpu(gpu):
            _, report, expected = patched(1024)
            needed = images_needed(expected)
            assert needed is not None
            kernel, images = needed
            assert best_at(expected, 0.99 * images) < 1 < best_at(expected, 1.01 * images)
            assert speed_at(expected, kernel, images) == pytest.approx(1.0)
            (line,) = report.break_even
            assert line in str(report)
            pairs = scientific(images * 6 * 4097**2)
            start = f"break-even at k=0.1, 4,097 tokens: batch x heads x N^2 of {pairs} with triton"
            assert line.startswith(start)
            found[gpu] = images
    assert len(set(found.values())) == 3, "derived from the prices of each GPU"
    assert found["NVIDIA H200"] > found["NVIDIA GeForce RTX 4090"], "launches take equally long"


def best_at(expected: Expected, images: float) -> float:
    return max(speed_at(expected, kernel, images) for kernel in expected.works)


def speed_at(expected: Expected, kernel: str, images: float) -> float:
    """Expected speed for a batch, planning included."""
    call, work = expected.choice.call, expected.works[kernel]
    assert call is not None
    dense = cost.prices(DENSE, call).of(call.dense.times(images))
    planning = cost.prices("planning", call).of(expected.planning.work.times(images))
    return dense / (cost.prices(kernel, call).of(work.times(images)) + planning)


@pytest.mark.usefixtures("h200")
def test_where_a_larger_batch_helps_it_is_advised() -> None:
    (told,), _, expected = patched(1024)
    needed = images_needed(expected)
    assert needed is not None
    assert f"batches of {-int(-needed[1] // 1)} images or more" in told
    (told,), report, expected = patched(224)
    assert images_needed(expected) is None
    assert "batches" not in told
    assert report.break_even[0].endswith(": no batch size; drop tokens, or use larger images")


def test_on_a_cpu_nothing_of_this_is_said() -> None:
    _, report, _ = patched(224)
    assert not report.break_even
    assert not report.estimated_from
    assert "data sheet" not in str(report)
