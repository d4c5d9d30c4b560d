"""The documentation cannot drift: its code runs, its names exist, every hook is described."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import sparsiattn
from sparsiattn import hookspecs

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_code_on_the_page_runs(page: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    module = ModuleType("docs_" + page.stem.replace("-", "_"))
    sys.modules[module.__name__] = module  # dataclasses look their module up
    try:
        exec(compile("\n".join(blocks), str(page), "exec"), vars(module))
    finally:
        del sys.modules[module.__name__]


def test_every_hook_is_documented() -> None:
    text = "".join(page.read_text() for page in PAGES)
    for name in vars(hookspecs):
        if name.startswith("sparsiattn_"):
            assert name in text


def test_every_public_name_has_a_docstring_and_is_real() -> None:
    for name in sparsiattn.__all__:
        assert getattr(sparsiattn, name).__doc__, name


def test_tables_are_those_of_the_results() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "tables.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_figures_in_readme_and_docs_have_their_files() -> None:
    for path in (ROOT / "README.md", *PAGES):
        for name in re.findall(r"benchmarks/results/[\w.-]+\.json", path.read_text()):
            assert (ROOT / name).is_file(), f"{path.name} cites {name}"
