"""The picture of the packages in CONTRIBUTING.md is that of the imports."""

from __future__ import annotations

import subprocess
import sys

from tests.support import ROOT


def test_the_map_of_packages_is_current() -> None:
    command = [sys.executable, str(ROOT / "tools" / "package_map.py"), "--check"]
    check = subprocess.run(command, capture_output=True, text=True, check=False)
    assert check.returncode == 0, check.stdout + check.stderr
