"""Shared fixtures, of the tests and of the examples in docstrings; tests that need the authors'
fixtures skip where the folder is absent."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from sparsiattn.kernels import cost
from tests.support.parts import is_in_part

# what someone tuned on this machine must not decide which kernels are tested
os.environ["SPARSIATTN_CACHE"] = str(Path(__file__).with_name("no-tuning-here"))
# nor must compiled code, but in the tests of it: what the package brings is not looked for, and
# without a compiler there is no other
os.environ["SPARSIATTN_NATIVE"] = "local"
# (processes that pytest-xdist starts find CC as it is left here)
COMPILER = os.environ.setdefault("CC_OF_NATIVE_TESTS", os.environ.get("CC", ""))
os.environ["CC"] = "no-compiler-in-these-tests"

# `torch.manual_seed` notes a traceback for devices that are not there: longer than many a test
SEED = (
    torch.manual_seed if torch.accelerator.is_available() else torch.default_generator.manual_seed
)

SLOW_VARIANTS = frozenset(
    Path(__file__).with_name("tests").joinpath("slow_variants.txt").read_text().splitlines()
)
SHARED = Path(__file__).resolve().parent.parent / "shared"


def pytest_collectstart() -> None:
    SEED(0)  # for what modules draw when they are imported


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--part", metavar="I/N", help="run only the I-th of N parts of the tests")


@pytest.hookimpl(tryfirst=True)  # before `-m` looks at the markers
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    part = config.getoption("--part")
    if part is not None:
        items[:] = [item for item in items if is_in_part(item.nodeid, part)]
    for item in items:
        if item.nodeid in SLOW_VARIANTS:
            item.add_marker(pytest.mark.slow)


def pytest_collection_finish() -> None:
    # thousands of tests and all that they import: every full collection would walk through them
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()  # or extension modules report leaks at exit


def pytest_fixture_setup(fixturedef: pytest.FixtureDef[object]) -> None:
    if fixturedef.scope != "function":  # whichever test of them comes first in this process
        SEED(0)


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    SEED(0)
    yield
    _forget_accelerate()
    assert torch.get_default_dtype() == torch.float32
    assert callable(F.scaled_dot_product_attention)


def _forget_accelerate() -> None:
    """Reset accelerate: its precision is that of the whole process.

    It also collects garbage three times in each training, half a second each among thousands of
    tests: a sixth of the time of the suite.
    """
    memory: Any = sys.modules.get("accelerate.utils.memory")
    if memory is not None:
        memory.gc = SimpleNamespace(collect=int)
    state = sys.modules.get("accelerate.state")
    if state is not None and state.AcceleratorState._shared_state:
        state.AcceleratorState._reset_state(reset_partial_state=True)
        state.GradientState._reset_state()


@pytest.fixture(scope="session")
def fixtures() -> Path:
    folder = SHARED / "fixtures"
    if not folder.is_dir():
        pytest.skip("the authors' fixtures are not here")
    return folder


@pytest.fixture(scope="session")
def native_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder of this run in which the native kernel is compiled once."""
    return tmp_path_factory.mktemp("native")


@pytest.fixture
def compiled_native(native_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The native kernel, compiled; afterwards nobody knows of it."""
    from sparsiattn.kernels import compile_native
    from sparsiattn.kernels.native import build, toolchain

    library = os.environ.get("NATIVE_OF_TESTS", "local")  # or one of the package's: "v3"
    monkeypatch.setenv("SPARSIATTN_NATIVE", library)
    monkeypatch.setenv("SPARSIATTN_CACHE", str(native_cache))
    monkeypatch.setenv("CC", COMPILER)
    build.forget()
    if library == "local" and toolchain.compiler() is None:
        pytest.skip("no C compiler")
    assert compile_native() is None
    yield
    build.forget()
    cost.reload()


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache without compiled code, and a compiler that is quick."""
    from sparsiattn.kernels.native import build, toolchain

    monkeypatch.setenv("SPARSIATTN_CACHE", str(tmp_path))
    monkeypatch.setenv("CC", COMPILER)
    build.forget()
    if toolchain.compiler() is None:
        pytest.skip("no C compiler")
    monkeypatch.setattr(toolchain, "FLAGS", tuple(x for x in toolchain.FLAGS if x != "-O3"))
    yield tmp_path
    build.forget()
    cost.reload()
