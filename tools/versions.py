"""Checks that all places that state the version agree with pyproject.toml.

    python tools/versions.py    # prints the version in each place; exits 1 if one differs

The version is defined in pyproject.toml. `sparsiattn.__version__` is that of the installed
package; CITATION.cff, the first heading of the changelog and pages that pin a version repeat it.
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
    """Return the version in each file: those of `PLACES`, and pages that pin a version."""
    found = {name: _first(root / name, pattern) for name, pattern in PLACES.items()}
    for page in [root / "README.md", *sorted((root / "docs").rglob("*.md"))]:
        pinned = set(re.findall(PINNED, page.read_text(encoding="utf-8")))
        if pinned:
            found[page.relative_to(root).as_posix()] = ", ".join(sorted(pinned))
    return found


def installed() -> str:
    """Return the version of the installed package, or `MISSING`."""
    try:
        return version("sparsiattn")
    except PackageNotFoundError:
        return MISSING


def differing(found: dict[str, str]) -> list[str]:
    """Return the places that state another version than pyproject.toml."""
    return [place for place, stated_there in found.items() if stated_there != found[PROJECT]]


def _first(path: Path, pattern: str) -> str:
    match = re.search(pattern, path.read_text(encoding="utf-8"), re.MULTILINE)
    return match[1] if match else MISSING


def main() -> int:
    found = {**stated(ROOT), "installed package": installed()}
    wrong = differing(found)
    for place, stated_there in found.items():
        print(f"{place:20} {stated_there}{'  <- differs' if place in wrong else ''}")
    if wrong:
        print(
            f"set them to {found[PROJECT]}, or change {PROJECT}; `make` installs the package again"
        )
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
