"""What an import brings with it, seen in a fresh interpreter."""

from __future__ import annotations

import json
import subprocess
import sys

HEAVY = frozenset(
    ("timm", "transformers", "triton", "xformers", "torchvision", "matplotlib", "accelerate")
)
"""Packages that no strategy, kernel or backbone may import before it is used."""


def imported_by(module: str) -> set[str]:
    """Top-level packages that importing ``module`` loads; raises `ImportError` with its fault."""
    names = "sorted({name.partition('.')[0] for name in sys.modules})"
    code = f"import json, sys; sys.path[:0] = {sys.path!r}; import {module}; "
    done = subprocess.run(
        [sys.executable, "-c", code + f"print(json.dumps({names}))"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise ImportError(f"{module} cannot be imported by itself: {done.stderr[-2000:]}")
    return set(json.loads(done.stdout.splitlines()[-1]))
