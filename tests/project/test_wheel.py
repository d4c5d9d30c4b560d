"""The wheel at work where nothing else of this project is, and no compiler."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from tests.support import ROOT


@pytest.mark.slow
def test_the_wheel_needs_no_compiler(tmp_path: Path) -> None:
    try:
        major = int(metadata.version("setuptools").split(".")[0])
    except metadata.PackageNotFoundError:
        major = 0
    if major < 77:
        pytest.skip("needs setuptools 77 or newer, as `make wheel` installs it")
    tool = str(ROOT / "tools" / "wheel_check.py")
    environment = {**os.environ, "CC": os.environ["CC_OF_NATIVE_TESTS"]}
    words = [sys.executable, tool, str(tmp_path)]
    ended = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert "works" in ended.stdout
    names = sorted(path.name for path in tmp_path.iterdir())
    assert [name.split("-")[0] for name in names] == ["sparsiattn", "sparsiattn"]
