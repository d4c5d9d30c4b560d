"""The packages that an import loads, measured in a fresh interpreter."""

from __future__ import annotations

import subprocess
import sys

HEAVY = frozenset(
    ("timm", "transformers", "triton", "xformers", "torchvision", "matplotlib", "accelerate")
)
"""Packages that no strategy, kernel or backbone may import before it is used."""


def imported_by(module: str) -> set[str]:
    """Top-level packages that importing a module loads.

    Raises:
        ImportError: The module cannot be imported on its own.
    """
    code = f"import sys; sys.path[:0] = {sys.path!r}; import {module}; print(*sys.modules)"
    command = [sys.executable, "-c", code]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if process.returncode:
        raise ImportError(f"{module} cannot be imported on its own: {process.stderr[-2000:]}")
    return {name.partition(".")[0] for name in process.stdout.splitlines()[-1].split()}
