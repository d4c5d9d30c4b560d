"""The Triton kernels without a GPU: interpreted on the CPU, and compiled for GPUs not there."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsiattn import Pattern
from sparsiattn.kernels import Triton
from sparsiattn.strategies import finish
from sparsiattn.testing import random_inputs
from tests.support import ROOT, environment

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)
# what a GPU of the consumer's kind gives one program
SHARED_MEMORY = 99 << 10
CASES = ("tests/kernels/triton_cases.py", "tests/kernels/triton_plan_cases.py")


def interpreted(cases: str, marker: str) -> None:
    """A file of cases in a process whose triton interprets."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", marker]
    run = subprocess.run(
        [*command, cases],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed is not None, run.stdout
    assert "skipped" not in run.stdout


@pytest.mark.parametrize("cases", CASES)
def test_interpreted_on_the_cpu(cases: str) -> None:
    interpreted(cases, "not slow")


@pytest.mark.slow
@pytest.mark.parametrize("cases", CASES)
def test_interpreted_on_the_cpu_at_length(cases: str) -> None:
    interpreted(cases, "slow")


def call(
    dim: int,
    tile: int,
    dtype: torch.dtype,
    *,
    block: int = 0,
    host: torch.dtype | None = None,
    even: bool = True,
    cells: int = 4,
) -> Any:
    """Operands of 4,097 tokens that are only shapes: keys one by one, or by blocks."""
    from sparsiattn.kernels._triton.launch import KeyListOperands

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    q, k, v = empty(2, 4097, 3, 6, dim).permute(2, 0, 3, 1, 4)
    tiles, wide = 4096 // tile, torch.float32
    chosen = empty(2, 6, tiles, 410 // block if block else 410, dtype=torch.int64)
    return KeyListOperands(
        q, k, v,
        pooled_k=empty(2, 6, cells, dim) if cells else None,
        pooled_v=empty(2, 6, cells, dim) if cells else None,
        host=None if host is None else empty(1, 6, 4097, 4097, dtype=host),
        rows=empty(2, 6, tiles, cells, dtype=wide) if cells else None,
        order=empty(tiles, tile, dtype=torch.int64),
        weight=None if even else empty(tiles, tile, dtype=wide),
        chosen=chosen,
        held=None if even or not block else chosen,
        table=empty(4096 // block, block, dtype=torch.int64) if block else None,
        first=1, prefix=1 if block else 0, keys=410, scale=0.125,
        lowest=None if host is None else -50.0,
    )  # fmt: skip


def launches(operands: Any) -> list[Any]:
    """The forward and the backward pass of one call, with every gradient."""
    from sparsiattn.kernels._triton import launch

    out = torch.empty_like(operands.q).transpose(1, 2).contiguous().transpose(1, 2)
    lse = torch.empty(2, 6, operands.queries, device="meta")
    found = [getattr(operands, name) for name in launch.GRADIENTS]
    if operands.host is not None and operands.host.dtype == torch.bool:
        found[5] = None
    sums = [None if x is None else torch.empty(x.shape, device="meta") for x in found[1:]]
    return [
        launch.forward(operands, out, lse),
        launch.backward(operands, out, lse, out, [operands.q, *sums]),
    ]


def repeatable(operands: Any) -> list[Any]:
    """The backward pass of one call without atomic additions; no mask, so no gradient of one."""
    from sparsiattn.kernels._triton import key_gradients, launch

    out = torch.empty_like(operands.q).transpose(1, 2).contiguous().transpose(1, 2)
    lse = torch.empty(2, 6, operands.queries, device="meta")
    member = torch.empty(2, 6, 64, 4097, dtype=torch.uint8, device="meta")
    each = (operands, lse, lse, out)
    return [
        launch.backward(operands, out, lse, out, [operands.q, *[None] * 6]),
        key_gradients.of_keys(*each, member, operands.k, operands.v),
        key_gradients.of_cells(*each, operands.pooled_k, operands.pooled_v),
    ]


def assert_compiles(operands: Any, capability: int = 90) -> None:
    from sparsiattn.kernels._triton.offline import compiled

    for launch in launches(operands):
        binary = compiled(launch, capability)
        assert binary.asm["cubin"]
        assert binary.metadata.shared <= SHARED_MEMORY, launch.kernel.__name__


@pytest.fixture
def _fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("interpreted kernels are not compiled")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.usefixtures("_fresh_cache")
class TestCompiles:
    def test_what_is_run_most(self) -> None:
        assert_compiles(call(64, 64, torch.bfloat16, block=16))

    def test_gradients_that_are_the_same_in_every_run_add_nothing_atomically(self) -> None:
        from sparsiattn.kernels._triton.offline import compiled

        for launch in repeatable(call(64, 64, torch.bfloat16, block=16)):
            program = compiled(launch, 90).asm["ptx"]
            assert not re.search(r"\b(atom|red)\.", program), launch.kernel.__name__

    @pytest.mark.slow
    def test_the_faster_ones_do(self) -> None:
        from sparsiattn.kernels._triton.offline import compiled

        _, backward = launches(call(64, 64, torch.bfloat16, block=16))
        assert re.search(r"\b(atom|red)\.", compiled(backward, 90).asm["ptx"])

    @pytest.mark.slow
    def test_uneven_blocks_under_a_bias(self) -> None:
        assert_compiles(call(72, 49, torch.float16, block=20, even=False, host=torch.float16))

    @pytest.mark.slow
    @pytest.mark.parametrize("host", [None, torch.bool, torch.float32])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    @pytest.mark.parametrize(("tile", "block"), [(16, 0), (64, 16), (128, 64), (256, 0)])
    @pytest.mark.parametrize("dim", [16, 88, 256])
    @pytest.mark.parametrize("capability", [80, 90])
    def test_every_size(
        self, capability: int, dim: int, tile: int, block: int, dtype: torch.dtype, host: Any
    ) -> None:
        assert_compiles(call(dim, tile, dtype, block=block, host=host, cells=16), capability)


@pytest.mark.usefixtures("_fresh_cache")
@pytest.mark.parametrize("name", ["pool D=64 bf16", "rank 1024 keys"])
def test_what_kernels_take_of_a_gpu(name: str, tmp_path: Path) -> None:
    """The script behind benchmarks/results/triton-registers.json, and that file."""
    script = ROOT / "benchmarks" / "triton_registers.py"
    command = [sys.executable, script, "--only", name, "--capability", "90", "--out", tmp_path]
    subprocess.run(command, check=True, capture_output=True, env=environment())
    (row,) = json.loads((tmp_path / "triton-registers.json").read_text())["rows"]
    assert row["program"] == name
    assert row["sm"] == 90
    assert 16 <= row["registers"] <= 255
    assert row["spilled_bytes"] == 0


def test_few_kernels_spill() -> None:
    """In the committed table, for each generation of GPU."""
    rows = json.loads((ROOT / "benchmarks/results/triton-registers.json").read_text())["rows"]
    assert {row["sm"] for row in rows} == {80, 90, 100}
    wasteful = {(row["program"], row["sm"]) for row in rows if row["spilled_bytes"] > 64}
    assert not {name for name, _ in wasteful if "bf16" in name and "backward" not in name}
    assert not {name for name, _ in wasteful if "gradients" in name}  # in single precision neither
    assert all(row["shared_bytes"] <= SHARED_MEMORY for row in rows)


def test_without_a_gpu_it_says_so() -> None:
    inputs = random_inputs(tile=(2, 2))
    pattern = finish(Pattern.top(torch.randn(1, 1, 17, 17), 5), inputs)
    kernel = Triton()
    if torch.cuda.is_available():
        assert kernel.why_unavailable() == []
        assert kernel.why_not(inputs, pattern) == ["needs CUDA tensors, got cpu"]
    elif os.environ.get("TRITON_INTERPRET") != "1":
        assert kernel.why_unavailable() == ["needs a CUDA device"]
        assert kernel.why_not(inputs, pattern) == [
            "needs a CUDA device", "needs CUDA tensors, got cpu",
        ]  # fmt: skip
