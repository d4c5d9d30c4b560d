"""Writes constraints/dev.txt: the versions of everything installed beside this, without builds."""

from __future__ import annotations

from importlib.metadata import distributions
from pathlib import Path

FILE = Path(__file__).resolve().parent.parent / "constraints" / "dev.txt"
OWN = ("sparsiattn", "pip", "setuptools", "wheel")
HEAD = """# The versions that development and CI were last run with (Linux x86-64), written by
# `make constraints`; `pip install -c constraints/dev.txt -e .[dev]` gives them again.
"""


def pins() -> list[str]:
    found = {
        one.name.lower().replace("_", "-"): one.version.partition("+")[0] for one in distributions()
    }
    return [f"{name}=={version}" for name, version in sorted(found.items()) if name not in OWN]


if __name__ == "__main__":
    FILE.write_text(HEAD + "\n".join(pins()) + "\n", encoding="utf-8")
    print(f"wrote {FILE.name}: {len(pins())} versions")
