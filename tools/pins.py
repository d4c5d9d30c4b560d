"""Write constraints/dev.txt: the versions of all installed packages, without build tools."""

from __future__ import annotations

from importlib.metadata import distributions
from pathlib import Path

FILE = Path(__file__).resolve().parent.parent / "constraints" / "dev.txt"
OWN = ("sparsiattn", "pip", "setuptools", "wheel")
HEAD = """# The versions that development and CI were last run with (Linux x86-64), written by
# `make constraints`; `pip install -c constraints/dev.txt -e .[dev]` installs them again.
"""


def pins() -> list[str]:
    versions = {
        package.name.lower().replace("_", "-"): package.version.partition("+")[0]
        for package in distributions()
    }
    return [f"{name}=={version}" for name, version in sorted(versions.items()) if name not in OWN]


if __name__ == "__main__":
    FILE.write_text(HEAD + "\n".join(pins()) + "\n", encoding="utf-8")
    print(f"wrote {FILE.name}: {len(pins())} versions")
