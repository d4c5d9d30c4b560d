"""The compiled code under the sanitizers for addresses and undefined behaviour."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from sparsiattn.kernels import tuning_cache
from sparsiattn.kernels.native import toolchain
from tests.support import ROOT

SANITIZE = "-fsanitize=address,undefined -fno-sanitize-recover=all"
# the code differs with the width of vectors
PROCESSORS = ["native"]
if platform.machine() == "x86_64":
    PROCESSORS += ["x86-64-v2"]
if "avx2" in (tuning_cache.cpuinfo("flags") or "").split():
    PROCESSORS += ["x86-64-v3"]


def runtime(compiler: str, name: str) -> str | None:
    """Where a compiler keeps a library of its sanitizers; None if it has none."""
    command = [compiler, f"-print-file-name=lib{name}.so"]
    found = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return found if Path(found).is_absolute() and Path(found).exists() else None


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="libraries are loaded first by LD_PRELOAD")
@pytest.mark.parametrize("processor", PROCESSORS)
def test_random_calls_are_clean(
    processor: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", os.environ["CC_OF_NATIVE_TESTS"])  # as conftest.py keeps it
    command = toolchain.compiler()
    libraries = [] if command is None else [runtime(command[0], x) for x in ("asan", "ubsan")]
    if not libraries or None in libraries:
        pytest.skip("the C compiler has no sanitizers")
    assert command is not None
    environment = {
        **os.environ,
        "SPARSIATTN_CACHE": str(tmp_path),
        "SPARSIATTN_NATIVE": "local",
        "CC": f"{command[0]} {SANITIZE}",
        "LD_PRELOAD": ":".join(map(str, libraries)),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own
    }
    call = [sys.executable, "-m", "tests.support.sanitized_calls", "400", "3", processor]
    done = subprocess.run(
        call, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=900
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.split() == ["400"]
