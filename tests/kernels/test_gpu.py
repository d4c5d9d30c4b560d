"""What needs a GPU: ``pytest -m gpu`` (see benchmarks/gpu_run.py)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch._dynamo.utils import counters

import sparsiattn
from sparsiattn import Pattern
from sparsiattn.attention.background import Summary, key_cells
from sparsiattn.kernels import (
    Flex,
    Gather,
    MaskedSDPA,
    Reference,
    Triton,
    Varlen,
    XFormers,
    triton_plan,
)
from sparsiattn.kernels import xformers as fmha
from sparsiattn.strategies import finish
from sparsiattn.testing import KernelSuite, random_inputs
from sparsiattn.testing.kernel import TOLERANCE, Case, _gradients, _on
from tests.support import zoo
from tests.support.flex_calls import flex_call
from tests.support.voting import VotingCase, assert_largest_votes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
SPARSE = [name for name in zoo.ATTENTION if name != "dense"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "case",
    [
        VotingCase((64, 64), (8, 8), k=410, dim=64, heads=6, batch=2, background=8),
        VotingCase((128, 128), (8, 8), k=1638, prefix=5, dim=64, heads=3, background=8),
        VotingCase((33, 35), (8, 4), k=115, dim=72, heads=3, background=10),
        VotingCase((32, 32), (8, 4), k=256, prefix=0, dim=128, heads=2, background=None),
    ],
)
def test_tiles_keep_the_keys_of_the_largest_votes(case: VotingCase, dtype: torch.dtype) -> None:
    case = replace(case, dtype=dtype)
    pattern = case.pattern("cuda")
    assert triton_plan.serves(pattern)
    assert_largest_votes(case, pattern, *case.lists(pattern))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("grid", "dim"), [((64, 64), 64), ((37, 37), 80), ((14, 14), 256)])
def test_pooled_keys_are_means_of_cells(
    grid: tuple[int, int], dim: int, dtype: torch.dtype
) -> None:
    cells = key_cells(grid, (5, 5), 1, device=torch.device("cuda"))
    packed = torch.randn(2, len(cells), 2, 6, dim, device="cuda").to(dtype)
    k, v = packed.permute(2, 0, 3, 1, 4)
    summary = Summary(cells, (5, 5), cells.new_zeros(1, 1, 1, 25), source=(grid, 1))
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    for mine, x in zip(triton_plan.pooled(summary, k, v), (k, v), strict=True):
        wanted = summary.pool(x.double()).to(dtype)
        torch.testing.assert_close(mine, wanted, rtol=tolerance, atol=tolerance)


def test_a_patched_model_is_captured_and_replayed() -> None:
    """The graph gives what eager calls give, also for other images."""
    model = zoo.build("vit").cuda().eval()
    static = torch.randn(2, 3, 32, 32, device="cuda")
    with (
        torch.no_grad(),
        sparsiattn.patch(model, "connectivity", k=0.3, tile=(4, 4), kernel="triton") as patch,
    ):
        patch.warmup(static)
        model(static)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = model(static)
        for _ in range(2):
            images = torch.randn(2, 3, 32, 32, device="cuda")
            wanted = model(images)
            static.copy_(images)
            graph.replay()
            torch.testing.assert_close(out, wanted)


class _OnCuda(KernelSuite):
    device = "cuda"
    dtypes = (torch.float32, torch.bfloat16, torch.float16)


class TestReferenceOnCuda(_OnCuda):
    kernel = Reference()


class TestMaskedSDPAOnCuda(_OnCuda):
    kernel = MaskedSDPA()


class TestGatherOnCuda(_OnCuda):
    kernel = Gather()


class TestTritonOnCuda(_OnCuda):
    kernel = Triton()


class TestFlexOnCuda(_OnCuda):
    """Tiles and blocks of powers of two, of one size and not, with whole and partial last blocks;
    each shape compiles, forward and backward."""

    kernel = Flex()
    dtypes = (torch.float32, torch.bfloat16)
    unready = 5  # all of `cases`

    def cases(self, dtype: torch.dtype) -> Iterator[Case]:
        sizes = {"tile": (4, 4), "block": (4, 4), "dtype": dtype, "device": "cuda"}
        yield "both", *flex_call(**sizes)
        yield "neither", *flex_call(prefix=0, background=None, k=32, **sizes)
        yield "shared", *flex_call(shared=True, prefix=5, background=3, k=30, **sizes)
        yield "uneven", *flex_call((7, 7), k=20, **sizes)
        large = {**sizes, "tile": (8, 8), "block": (8, 8), "dim": 64}
        yield "large", *flex_call((32, 32), k=200, **large)


def test_flex_compiles_once_for_forward_and_backward() -> None:
    kernel, seen = Flex(), []
    for seed in range(3):
        inputs, pattern = flex_call(
            (16, 16), k=60, tile=(4, 4), block=(4, 4), seed=seed, device="cuda"
        )
        leaves = [x.requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
        assert kernel.why_not(inputs, pattern) == []
        if seed == 0:
            assert kernel.not_ready(inputs, pattern) != []
            kernel.warmup(inputs, pattern)
        assert kernel.not_ready(inputs, pattern) == []
        torch.autograd.grad(kernel(inputs, pattern).sum(), leaves)
        seen.append((counters["stats"]["unique_graphs"], counters["aot_autograd"]["total"]))
    assert seen[0] == seen[1] == seen[2]


def test_warmup_makes_flex_ready_to_train() -> None:
    model = zoo.build("vit").cuda().train()
    x = torch.randn(2, 3, 32, 32, device="cuda")
    options = {"k": 0.3, "tile": (4, 4), "block": (4, 4), "kernel": "flex"}
    with sparsiattn.patch(model, "topk", **options) as handle:
        handle.warmup(x)
        before = counters["stats"]["unique_graphs"]
        model(x).square().sum().backward()
        assert counters["stats"]["unique_graphs"] == before
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


class TestXFormersOnCuda(_OnCuda):
    kernel = XFormers()


class TestPagedXFormersOnCuda(_OnCuda):
    """Blocks of 16 to 128 keys; forward only, half precision."""

    kernel = XFormers()
    dtypes = (torch.float16, torch.bfloat16)

    def cases(self, dtype: torch.dtype) -> Iterator[Case]:
        for grid, tile, block, dim in (
            ((8, 8), (4, 4), (4, 4), 16),
            ((16, 16), (8, 8), (8, 4), 32),
            ((16, 16), (5, 5), (8, 8), 64),
            ((32, 32), (8, 8), (8, 16), 128),
        ):
            for prefix, background in ((0, None), (1, 2), (5, None)):
                yield f"{grid} prefix={prefix} background={background}", *flex_call(
                    grid, k=grid[0] * grid[1] // 3, tile=tile, block=block, dim=dim, prefix=prefix,
                    background=background, dtype=dtype, device="cuda",
                )  # fmt: skip

    def test_runs_something(self) -> None:
        call = flex_call(block=(4, 4), dtype=torch.float16, device="cuda")
        reasons = self.kernel.why_not(*call)
        # xformers' paged operator needs an older triton than torch may bring along
        assert all("paged operator" in reason for reason in reasons) or fmha.probe().ops is None


class TestVarlenOnCuda(_OnCuda):
    kernel = Varlen()
    dtypes = (torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [64, 72, 256])
@pytest.mark.parametrize("block", [1, (4, 4)])
def test_triton_equals_gather_at_size(block: object, dim: int, dtype: torch.dtype) -> None:
    """4,097 tokens, 6 heads, tiles of 8 x 8, a tenth of the keys and pooled ones."""
    inputs = _on(random_inputs((64, 64), heads=6, dim=dim, tile=(8, 8), block=block), "cuda")
    inputs = inputs.replace(q=inputs.q / 2, k=inputs.k / 2)
    scores = torch.randn(2, 6, 64, 4097, device="cuda")
    pattern = finish(Pattern.top(scores, 0.1), inputs, background=2)
    narrow = inputs.replace(q=inputs.q.to(dtype), k=inputs.k.to(dtype), v=inputs.v.to(dtype))
    assert Triton().why_not(narrow, pattern) == []
    # gather in single precision on operands as rounded as ours
    exact = inputs.replace(q=narrow.q.float(), k=narrow.k.float(), v=narrow.v.float())
    out = Triton()(narrow, pattern)
    torch.testing.assert_close(out.float(), Gather()(exact, pattern), **TOLERANCE[dtype])
    for mine, theirs in zip(
        _gradients(Triton(), narrow, pattern), _gradients(Gather(), exact, pattern), strict=True
    ):
        tolerance = 1e-3 if dtype == torch.float32 else 5e-2
        error = (mine.float() - theirs).norm() / theirs.norm()
        assert error < tolerance, error


@pytest.mark.parametrize("tile", [(2, 2), (8, 8)])
def test_triton_trains_and_compiles_in_a_model(tile: tuple[int, int]) -> None:
    model, x = zoo.build("vit").cuda(), torch.randn(2, 3, 32, 32, device="cuda")
    weight, found = model.patch_embed.proj.weight, []
    for kernel, compiled in (("reference", False), ("triton", False), ("triton", True)):
        with sparsiattn.patch(model, "local", k=0.3, tile=tile, background=2, kernel=kernel):
            run = torch.compile(model, fullgraph=True) if compiled else model
            out = run(x)
            found.append((out, torch.autograd.grad(out.square().sum(), weight)[0]))
        torch.compiler.reset()
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-3, atol=1e-3)


TOKENS = {
    "drop": {"strategy": "token_drop", "keep": 0.5, "layers": [0], "fuse": True},
    "merge": {"strategy": "token_merge", "r": 9},
    "adaptive": {"strategy": "token_drop", "keep": "adaptive", "mass": 0.7, "layers": [0]},
    "hybrid": {"strategy": "hybrid", "keep": 0.5, "layers": [0], "only_if_faster": False},
}


@pytest.mark.parametrize("name", TOKENS)
@pytest.mark.parametrize("family", ["vit", "vit_registers", "eva_rope", "beit"])
def test_token_strategies_move_to_the_gpu(family: str, name: str) -> None:
    model = zoo.build(family).double()
    x = zoo.images(model).double()
    if (family, name) == ("eva_rope", "adaptive"):
        pytest.skip("refused: blocks that take position tables")
    with torch.no_grad(), sparsiattn.patch(model, **TOKENS[name]):
        here = model(x)
        there = model.cuda()(x.cuda())
        torch.testing.assert_close(there.cpu(), here, rtol=1e-6, atol=1e-8)


def test_packed_images_take_a_ragged_kernel_and_train() -> None:
    model = zoo.build("vit").cuda().train()
    x = torch.randn(4, 3, 32, 32, device="cuda")
    options = {"keep": "adaptive", "mass": 0.7, "layers": [0]}
    with sparsiattn.patch(model, "token_drop", **options):
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = model(x).float().square().sum()
        loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("tile", [1, (2, 2)])
@pytest.mark.parametrize("strategy", SPARSE)
@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_a_patched_model_moves_to_the_gpu(family: str, strategy: str, tile: object) -> None:
    """Same keys and same output as on the CPU, wherever the model was patched."""
    model = zoo.build(family).double()  # no tie is broken differently by rounding
    x = zoo.images(model).double()
    with torch.no_grad(), sparsiattn.patch(model, strategy, k=0.3, tile=tile):
        here = model(x)
        there = model.cuda()(x.cuda())
        torch.testing.assert_close(there.cpu(), here, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("strategy", SPARSE)
def test_autocast_trains(strategy: str) -> None:
    model = zoo.build("vit").cuda().train()
    x = torch.randn(2, 3, 32, 32, device="cuda")
    with sparsiattn.patch(model, strategy, k=0.3, tile=(2, 2)):
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = model(x).float().square().sum()
        loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_compiled_by_inductor() -> None:
    model, x = zoo.build("vit").cuda(), torch.randn(2, 3, 32, 32, device="cuda")
    with torch.no_grad(), sparsiattn.patch(model, k=0.3, tile=(2, 2)):
        exact = model(x)
        compiled = torch.compile(model, fullgraph=True)
        torch.testing.assert_close(compiled(x), exact, rtol=1e-3, atol=1e-4)
    torch.compiler.reset()
