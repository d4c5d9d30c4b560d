"""The kernel in C: equal to the reference, exact in its refusals, safe to build."""

from __future__ import annotations

import copy
import os
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import sparsiattn
from sparsiattn import Pattern
from sparsiattn.attention import KeyBlocks, KeyIndex, KeyLists
from sparsiattn.errors import KernelRefused
from sparsiattn.kernels import compile_native
from sparsiattn.kernels.native import build
from sparsiattn.kernels.native import scores as planning
from sparsiattn.strategies import Connectivity, finish
from sparsiattn.testing import random_inputs, tiny_images, tiny_vit
from tests.support import ROOT
from tests.support.native_calls import KERNEL, call, same


@pytest.mark.usefixtures("compiled_native")
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    grid=st.tuples(st.integers(2, 13), st.integers(2, 13)),
    tile=st.sampled_from([1, (1, 2), (2, 2), (4, 4), (5, 3), (8, 8), (9, 9)]),
    block=st.sampled_from([1, (2, 2), (4, 3)]),
    dim=st.sampled_from([8, 13, 16, 72, 88]),
    value_dim=st.sampled_from([8, 11, 64]),
    prefix=st.integers(0, 3) | st.sampled_from([9, 70]),  # many of them go in parts
    k=st.floats(0.05, 0.95),
    background=st.sampled_from([None, 1, 3]),
    seed=st.integers(0, 99),
)
def test_equals_the_reference(grid: tuple[int, int], tile: object, block: object, dim: int,
                              value_dim: int, prefix: int, k: float, background: int | None,
                              seed: int) -> None:  # fmt: skip
    inputs, pattern = call(
        grid, tile, block, dim=dim, value_dim=value_dim, prefix=prefix, k=k, background=background,
        seed=seed,
    )  # fmt: skip
    assume(isinstance(pattern, KeyLists))  # a budget that rounds up to all keys is dense
    same(inputs, pattern)


@pytest.mark.usefixtures("compiled_native")
@pytest.mark.parametrize("dim", [8, 24, 72, 80, 88, 128, 256])
def test_head_dims(dim: int) -> None:
    same(*call((16, 17), (8, 8), (4, 4), dim=dim, value_dim=dim))
    same(*call((16, 16), (16, 16), 1, dim=dim, value_dim=dim))


@pytest.mark.usefixtures("compiled_native")
def test_lists_shared_by_images_and_heads_and_a_row_of_biases_per_query() -> None:
    inputs, pattern = call((8, 8), (4, 4), (2, 2))
    assert isinstance(pattern, KeyBlocks)
    assert pattern.summary is not None
    bias = torch.randn(1, 2, 64, pattern.summary.count)
    bias[..., 0] = float("-inf")
    shared = replace(
        pattern, chosen=pattern.chosen[:1, :1], summary=replace(pattern.summary, bias=bias)
    )
    same(inputs, shared)


@pytest.mark.usefixtures("compiled_native")
def test_large_logits_and_numbers_that_are_none() -> None:
    inputs, pattern = call((8, 8), (4, 4), (2, 2))
    same(inputs.replace(q=60 * inputs.q), pattern, rtol=2e-3)
    broken = inputs.v.clone()
    broken[0, 1] = float("nan")
    out = KERNEL(inputs.replace(v=broken), pattern)
    assert out[0, 1].isnan().all()
    assert not out[1].isnan().any()
    broken = inputs.q.clone()
    broken[0, 1, 5] = float("nan")
    out = KERNEL(inputs.replace(q=broken), pattern)
    assert out[0, 1, 5].isnan().all()
    assert out.isnan().sum() == out.shape[-1]


@pytest.mark.usefixtures("compiled_native")
def test_a_list_of_nothing_gives_zero() -> None:
    inputs, pattern = call((8, 8), (4, 4), 1, background=None)
    assert isinstance(pattern, KeyIndex)
    out = KERNEL(inputs, replace(pattern, index=pattern.index[..., :0]))
    assert (out[..., 1:, :] == 0).all()
    assert (out[..., 0, :] != 0).any()


@pytest.mark.usefixtures("compiled_native")
def test_refusals() -> None:
    inputs, pattern = call((8, 8), (4, 4), (2, 2))

    def why(pattern: Pattern = pattern, **changes: object) -> str:
        return "; ".join(KERNEL.why_not(inputs.replace(**changes), pattern))

    assert why() == ""
    assert "needs key lists, got a Dense" in why(Pattern.dense(65, 65))
    assert "same dtype out of float32" in why(q=inputs.q.half())
    assert "same dtype out of float32" in why(v=inputs.v.double())
    assert "dropout" in why(dropout=0.1)
    assert why(q=inputs.q.clone().requires_grad_()) == ""
    bias = torch.zeros(1, 1, 65, 65, requires_grad=True)
    assert why(bias=bias) == "does not support a gradient of the model's bias"
    assert why(bias=torch.ones(2, 2, 65, 65)) == ""
    wide = torch.zeros(2, 2, 65, 257)
    assert "up to 256, got 257" in why(q=wide, k=wide)
    assert "needs CPU tensors, got cuda" in why(target_device=torch.device("cuda"))
    with torch.no_grad():
        assert why(bias=bias) == ""


@pytest.mark.usefixtures("compiled_native")
def test_threads_give_the_same() -> None:
    inputs, pattern = call((16, 16), (8, 8), (4, 4))
    exact = KERNEL(inputs, pattern)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: KERNEL(inputs, pattern), range(40)))
    assert all(torch.equal(exact, one) for one in found)


PLANS = [
    ((16, 16), (8, 8), 1, 64, {}),
    ((21, 30), (8, 8), 2, 72, {}),
    ((14, 14), (7, 7), 0, 13, {"mean_query_boost": False}),
    ((32, 32), (8, 8), 1, 80, {"self_weight": None}),
    ((32, 32), (16, 8), 5, 32, {"head_scale": True, "basis": 20}),
]


@pytest.mark.usefixtures("compiled_native")
@pytest.mark.parametrize(("grid", "tile", "prefix", "dim", "options"), PLANS)
def test_scores_are_those_of_torch(grid: tuple[int, int], tile: tuple[int, int], prefix: int,
                                   dim: int, options: dict[str, object]) -> None:  # fmt: skip
    inputs, _ = call(grid, tile, 1, dim=dim, prefix=prefix, heads=3)
    strategy = Connectivity(k=0.1, tile=tile, block=(2, 2), **options)  # type: ignore[arg-type]
    planner = strategy.planner(inputs.site)
    inputs = inputs.replace(block=(2, 2))
    with torch.no_grad():
        found = planner.scores(inputs)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(planning, "serves", lambda *tensors: False)
            exact = planner.scores(inputs)
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-7)


@pytest.mark.usefixtures("compiled_native")
@pytest.mark.parametrize(("columns", "count"), [(1, 1), (7, 7), (300, 26), (1024, 300)])
def test_the_best_are_those_of_torch(columns: int, count: int) -> None:
    scores = torch.randn(3, 2, 5, columns)
    assert torch.equal(planning.top(scores, count), scores.topk(count).indices)
    ties = torch.zeros(1, 1, 2, columns)
    ties[..., -1] = float("inf")
    ties[..., 0, 0] = float("nan")
    first = planning.top(ties, count)
    assert all(len(set(row.tolist())) == count for row in first[0, 0])
    assert first[0, 0, 0, 0] == 0
    assert first[0, 0, 1, 0] == columns - 1


def model() -> tuple[nn.Module, Tensor]:
    vit, images = tiny_vit().eval(), tiny_images(2)
    return vit, images


@pytest.mark.usefixtures("compiled_native")
def test_a_copy_gives_the_same() -> None:
    vit, images = model()
    options = {"k": 0.3, "tile": (2, 2), "kernel": "native"}
    with torch.no_grad(), sparsiattn.patch(vit, "connectivity", **options):  # type: ignore[arg-type]
        exact = vit(images)
        assert torch.equal(copy.deepcopy(vit)(images), exact)


class Attend(nn.Module):
    """One call of the kernel."""

    def forward(self, q: Tensor) -> Tensor:
        inputs, pattern = PREPARED
        return KERNEL(inputs.replace(q=q), pattern)


PREPARED = call((8, 8), (4, 4), (2, 2))


@pytest.mark.usefixtures("compiled_native")
def test_one_call_is_traced_whole() -> None:
    inputs, _ = PREPARED
    module = Attend().eval()
    with torch.no_grad():
        exact = module(inputs.q)
        compiled = torch.compile(module, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(inputs.q), exact)


@pytest.mark.slow
@pytest.mark.usefixtures("compiled_native")
def test_compiled_and_exported() -> None:
    vit, images = model()
    with torch.no_grad(), sparsiattn.patch(vit, "connectivity", k=0.3, tile=(2, 2),
                                           kernel="native"):  # fmt: skip
        exact = vit(images)
        torch._dynamo.reset()
        compiled = torch.compile(vit, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(images), exact, rtol=1e-4, atol=1e-5)
        program = torch.export.export(vit, (images,))
        assert "native_attention" in str(program.graph)
        torch.testing.assert_close(program.module()(images), exact, rtol=1e-4, atol=1e-5)


def test_the_operators_keep_torchs_rules(compiled_native: None) -> None:
    inputs, pattern = call((8, 8), (4, 4), (2, 2))
    assert isinstance(pattern, KeyBlocks)
    assert pattern.tiles is not None
    ops = torch.ops.sparsiattn
    rest = (pattern.blocks.order, None, pattern.tiles.order, None, None, 0, pattern.keys, 1, 1, 0.3)
    operands = (inputs.q, inputs.k, inputs.v, pattern.chosen, *rest)
    torch.library.opcheck(ops.native_attention.default, operands)
    torch.library.opcheck(ops.native_top.default, (torch.randn(1, 2, 3, 9), 4))
    blocks, units = pattern.blocks.count, pattern.blocks.count + 1
    tables = (torch.rand(units, 4), torch.rand(units, 4), torch.ones(1), torch.rand(4, blocks))
    scored = (inputs.q, inputs.k, pattern.tiles.order, None, pattern.blocks.order, None, *tables)
    torch.library.opcheck(ops.native_scores.default, (*scored, 3, 1, 0.3, 0.3, 0.0, True))


def test_only_warmup_compiles(bare: Path) -> None:
    vit, images = model()
    with torch.no_grad(), sparsiattn.patch(vit, "connectivity", k=0.1, tile=(4, 4)):
        vit(images)
        assert not list(bare.rglob("*.so"))
        inputs, pattern = call((8, 8), (4, 4), (2, 2))
        assert KERNEL.not_ready(inputs, pattern) == [
            "not compiled yet on this machine: run patch.warmup(images) once"
        ]
        KERNEL.warmup(inputs, pattern)
        assert KERNEL.not_ready(inputs, pattern) == []
        same(inputs, pattern)
    assert [path.name for path in bare.rglob("*") if path.is_file()] == [build.path().name]
    build.forget()
    assert build.is_ready()  # found again, as by the next process


def test_a_broken_compiler_is_a_reason(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "false")
    why = compile_native()
    assert why is not None
    assert "false failed with status 1" in why
    assert KERNEL.why_unavailable() == [why]
    assert why in sparsiattn.list_kernels()["native"].reasons
    vit, images = model()
    with (
        torch.no_grad(),
        pytest.raises(KernelRefused, match="failed with status 1"),
        sparsiattn.patch(vit, "connectivity", k=0.1, tile=(4, 4), kernel="native"),
    ):
        vit(images)


def test_no_compiler_is_a_reason(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    assert KERNEL.why_unavailable() == [
        "$CC names the C compiler 'no-such-compiler', which was not found"
    ]
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", str(bare))
    assert KERNEL.why_unavailable() == ["no C compiler was found (cc, gcc, clang or $CC)"]


def test_a_cache_that_cannot_be_written(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = bare / "file"
    file.write_text("")
    monkeypatch.setenv("SPARSIATTN_CACHE", str(file / "inside"))
    build.forget()
    assert compile_native() is None
    same(*call((8, 8), (4, 4), (2, 2)))
    assert file.read_text() == ""


def test_a_library_that_is_broken_is_made_anew(bare: Path) -> None:
    where = build.path()
    where.parent.mkdir(parents=True)
    where.write_bytes(b"not a library")
    assert not build.is_ready()
    assert compile_native() is None
    same(*call((8, 8), (4, 4), (2, 2)))
    assert where.stat().st_size > 10_000
    assert where.stat().st_mode & stat.S_IRUSR


@pytest.mark.slow
def test_two_processes_may_build_at_once(bare: Path) -> None:
    code = (
        "from sparsiattn.kernels.native import build, toolchain\n"
        "toolchain.FLAGS = tuple(x for x in toolchain.FLAGS if x != '-O3')\n"
        "assert build.compile_here() is None"
    )
    command = [sys.executable, "-c", code]
    both = [subprocess.Popen(command, cwd=ROOT, env={**os.environ}) for _ in range(2)]
    assert [one.wait(timeout=240) for one in both] == [0, 0]
    assert [path.name for path in bare.rglob("*") if path.is_file()] == [build.path().name]
    assert build.is_ready()


def test_random_inputs_of_the_suites_pass_too(compiled_native: None) -> None:
    inputs = random_inputs((4, 5), prefix=2, tile=(2, 3), block=(2, 2))
    scores = torch.rand(2, 3, inputs.n_keys, inputs.n_keys)
    same(inputs, finish(Pattern.top(scores, 9), inputs, background=2))
