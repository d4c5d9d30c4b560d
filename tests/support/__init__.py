"""What the tests of several packages share."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def environment(**variables: str) -> dict[str, str]:
    """That of a process which imports the library, its backbones and these helpers."""
    path = os.pathsep.join(map(str, (ROOT, ROOT / "backbones")))
    return {**os.environ, "PYTHONPATH": path, **variables}
