"""Checks that every place that states the version agrees with pyproject.toml.

    python tools/versions.py    # prints what each place says; exits 1 where one differs

The version is kept in pyproject.toml alone. `sparsiattn.__version__` is that of the installed
package; CITATION.cff, the changelog's first heading and pages that pin a version repeat it.
"""

from __future__ import annotations

import re
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PROJECT = "pyproject.toml"
PLACES = {
    PROJECT: r'^version = "([^"]+)"$',
    "CITATION.cff": r"^version: (\S+)$",
    "CHANGELOG.md": r"^## (\S+)",
}
PINNED = r"sparsiattn(?:\[[\w,]+\])?(?:==| v?)(\d+\.\d+\.\d+\w*)"
MISSING = "no version"


def stated(root: Path) -> dict[str, str]:
    """What files say: the first version in each of `PLACES`, and any other that a page pins."""
    found = {name: _first(root / name, pattern) for name, pattern in PLACES.items()}
    for page in [root / "README.md", *sorted((root / "docs").rglob("*.md"))]:
        pinned = set(re.findall(PINNED, page.read_text(encoding="utf-8")))
        if pinned:
            found[page.relative_to(root).as_posix()] = ", ".join(sorted(pinned))
    return found


def installed() -> str:
    """The version of the package that this interpreter imports."""
    try:
        return version("sparsiattn")
    except PackageNotFoundError:
        return MISSING


def differing(found: dict[str, str]) -> list[str]:
    """Places that do not say what pyproject.toml says."""
    return [place for place, said in found.items() if said != found[PROJECT]]


def _first(path: Path, pattern: str) -> str:
    match = re.search(pattern, path.read_text(encoding="utf-8"), re.MULTILINE)
    return match[1] if match else MISSING


def main() -> int:
    found = {**stated(ROOT), "installed package": installed()}
    wrong = differing(found)
    for place, said in found.items():
        print(f"{place:20} {said}{'  <- differs' if place in wrong else ''}")
    if wrong:
        print(f"set them to {found[PROJECT]}, or change {PROJECT}; make installs the package anew")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
