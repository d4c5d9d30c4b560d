"""Every library of the package gives what this machine's own code gives, on the processor it is
for: calls are recorded here, and made again by a C program under an emulator of that processor."""

from __future__ import annotations

import itertools
import platform
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest
import torch

from sparsiattn.attention import TopLogits
from sparsiattn.kernels import Native, Reference
from sparsiattn.kernels.native import biased, lists, merge, ops, shipped, toolchain
from sparsiattn.kernels.native.entries import ENTRIES
from sparsiattn.strategies import finish
from tests.kernels.test_native_rows import finished, operands
from tests.support import ROOT
from tests.support.host_masks import HALVES, KINDS, Case, tolerances
from tests.support.native_calls import call
from tests.support.recorded_calls import Recorded, record, results_of

pytestmark = pytest.mark.slow
ARM_ROOT = "/usr/aarch64-linux-gnu"
OPS = torch.ops.sparsiattn
X86 = platform.machine() in ("x86_64", "AMD64")

# how to run a program, by name: the compiler, the flags of the code, the command before it
PLACES = {
    "v2-nehalem": ("cc", toolchain.X86["v2"], ["qemu-x86_64", "-cpu", "Nehalem"]),
    "v2": ("cc", toolchain.X86["v2"], []),
    "v3": ("cc", toolchain.X86["v3"], []),
    "v4": ("cc", toolchain.X86["v4"], []),
    # what is written for AVX-512, in registers of 256 bits
    "wide": ("cc", (*toolchain.X86["v3"], "-DWIDE", "-Wno-psabi"), []),
    "neon": (
        "aarch64-linux-gnu-gcc",
        toolchain.ARM["neon"],
        ["qemu-aarch64", "-L", ARM_ROOT],
    ),
}
# lists of what is best come of sums, and near ties fall one way or the other
SUMS = ("votes",)


def _attention() -> list[Recorded]:
    cases = [
        call((16, 16), (8, 8), (4, 4)),
        call((9, 7), (5, 3), (4, 3), dim=13, value_dim=11, prefix=3),
        call((8, 8), 1, 1, dim=64, value_dim=64, prefix=0),
        call((14, 14), (7, 7), (2, 2), dim=72, value_dim=80, background=None),
    ]
    kinds = [(64, 64), (13, 11), (80, 72)]
    for grid, prefix, k, g in (
        ((14, 14), 1, 0.1, 5),
        ((11, 6), 0, 0.76, 3),
        ((9, 2), 3, 0.9, None),
    ):
        for dim, width in kinds:
            inputs = operands(grid, prefix, dim, width, 0, whole=False)
            cases.append((inputs, finished(inputs, k, g)))
    found = []
    for inputs, pattern in cases:
        recorded = record(lambda i=inputs, p=pattern: Native()(i, p))  # type: ignore[misc]
        exact = Reference()(inputs, pattern)
        for result in recorded[-1].results.values():
            torch.testing.assert_close(result, exact, rtol=1e-4, atol=1e-5)
        found += recorded
    return found


def _planning() -> list[Recorded]:
    inputs, pattern = call((16, 16), (4, 4), (2, 2), dim=64, heads=3)
    tiles, blocks = pattern.tiles.order, pattern.blocks.order  # type: ignore[attr-defined]
    units = len(blocks) + 1
    tables = (torch.rand(units, 8), torch.rand(units, 8), torch.ones(1))
    shares = torch.rand(len(tiles), len(blocks))
    q, k = inputs.q, inputs.k
    planned = (q, k, tiles, None, blocks, None, *tables, shares, 7, 1, 0.3, 0.3, 0.0, True)
    scores = torch.randn(2, 3, 5, 300)
    held = torch.full((len(tiles),), tiles.shape[1])
    calls = record(lambda: ops._scores(*planned))
    calls += record(lambda: OPS.native_top(scores, 26)) + record(
        lambda: OPS.native_top(scores, 250)
    )
    calls += record(lambda: OPS.native_best_keys(scores, 40, 1))
    return calls + record(lambda: lists._voted_keys(q, k, tiles, held, 4, 30, 1, 0.125))


def _masked() -> list[Recorded]:
    """Rows and tiles under masks and biases of hosts, in other types, too."""
    calls = []
    for kind, dtype in itertools.product(KINDS, (torch.float32, *HALVES)):
        case = Case((9, 6), 1, (40, 24), kind, (1, 3), dtype, seed=1).as_sam()
        # tiles are converted by torch before, and after
        for tile in (1, (4, 4)) if dtype is torch.float32 else (1,):
            inputs = case.inputs(tile=tile)
            pattern = finish(TopLogits.of(inputs, 0.3), inputs, background=None)
            calls += record(lambda i=inputs, p=pattern: Native()(i, p))  # type: ignore[misc]
    return calls


def _gradients() -> list[Recorded]:
    inputs, pattern = call((9, 7), (5, 3), (4, 3), dim=40, value_dim=24, prefix=3)
    q, k, v = (x.clone().requires_grad_() for x in (inputs.q, inputs.k, inputs.v))
    with torch.enable_grad():
        out = Native()(inputs.replace(q=q, k=k, v=v), pattern)
        return record(lambda: torch.autograd.grad(out, (q, k, v), torch.ones_like(out)))


def _merging() -> list[Recorded]:
    k, x = torch.randn(2, 3, 41, 24), torch.randn(2, 40, 37)
    size, bias = torch.randint(1, 5, (2, 40)).float(), torch.rand(2, 41)
    calls = record(lambda: merge._merged(k, x, size, 11, 1, 0))
    calls += record(lambda: merge._merged(k, x, None, 20, 1, 0))
    return calls + record(lambda: biased._key_biased(k, k, k, bias, 0.2))


@cache
def _recorded() -> list[Recorded]:
    torch.manual_seed(0)
    calls, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            calls += _attention() + _planning() + _masked() + _gradients() + _merging()
    finally:
        torch.set_num_threads(threads)
    assert {call.name for call in calls} == set(ENTRIES), "record a call of every function"
    return calls


@pytest.fixture
def calls(compiled_native: None) -> list[Recorded]:
    return _recorded()


def _program(compiler: str, folder: Path) -> Path:
    target = folder / "replay"
    source = ROOT / "tests" / "support" / "replay.c"
    command = [compiler, "-O1", str(source), "-o", str(target), "-ldl", "-lpthread"]
    subprocess.run(command, check=True)
    return target


@pytest.mark.parametrize("place", PLACES)
def test_the_same_comes_out_everywhere(
    place: str, calls: list[Recorded], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler, flags, emulator = PLACES[place]
    for tool in (compiler, *emulator[:1]):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not here")
    if compiler == "cc" and not X86:
        pytest.skip("the compiler here makes no code for x86")
    level = {"wide": "v3"}.get(place, place)
    if level in toolchain.X86 and level not in _levels_here(tmp_path, monkeypatch):
        pytest.skip(f"the processor here has no {level}")
    monkeypatch.setenv("CC", compiler)
    library = tmp_path / "library.so"
    assert toolchain.compile_library(toolchain.HERE / toolchain.MAIN, flags, library) is None
    (tmp_path / "calls").write_bytes(b"".join(call.to_bytes() for call in calls))
    words = [*emulator, str(_program(compiler, tmp_path))]
    words += [str(library), str(tmp_path / "calls"), str(tmp_path / "results")]
    subprocess.run(words, check=True, timeout=300)
    found = results_of(calls, (tmp_path / "results").read_bytes())
    for call_, tensors in zip(calls, found, strict=True):
        for result, exact in zip(tensors, call_.results.values(), strict=True):
            _same(call_.name, result, exact)


def _same(name: str, found: torch.Tensor, exact: torch.Tensor) -> None:
    if found.is_floating_point():
        torch.testing.assert_close(found, exact, **tolerances(found.dtype))
    elif name in SUMS:
        assert (found == exact).float().mean() > 0.99
    else:
        assert torch.equal(found, exact), name


def _levels_here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("CC", "cc")
    library = folder / toolchain.file_name("level")
    assert toolchain.compile_library(toolchain.HERE / "level.c", (), library) is None
    monkeypatch.setattr(shipped, "FOLDER", folder)
    return shipped._suiting()[0]


LEVEL_OF = {"qemu64": 1, "Nehalem": 2, "Haswell": 3, "Westmere": 2, "EPYC": 3}


@pytest.mark.parametrize("cpu", LEVEL_OF)
def test_the_level_of_a_processor(cpu: str, tmp_path: Path) -> None:
    if shutil.which("qemu-x86_64") is None or not X86:
        pytest.skip("qemu-x86_64 is not here")
    main = tmp_path / "main.c"
    main.write_text("int sparsiattn_level(void);\nint main(void) { return sparsiattn_level(); }\n")
    level = toolchain.HERE / "level.c"
    subprocess.run(["cc", str(main), str(level), "-o", str(tmp_path / "main")], check=True)
    words = ["qemu-x86_64", "-cpu", cpu, str(tmp_path / "main")]
    found = subprocess.run(words, check=False, stderr=subprocess.DEVNULL)
    assert found.returncode == LEVEL_OF[cpu]
