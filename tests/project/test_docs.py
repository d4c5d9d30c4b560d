"""The documentation cannot drift: its code runs, its names exist, every hook is described."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer

import sparsiattn
from sparsiattn.cli import app
from sparsiattn.registry import hookspecs
from sparsiattn.registry.registry import REGISTRY
from tests.support import ROOT

PAGES = sorted((ROOT / "docs").rglob("*.md"))


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


PUBLIC = {name: getattr(sparsiattn, name) for name in sparsiattn.__all__}
FAULTS = {n for n, o in PUBLIC.items() if inspect.isclass(o) and issubclass(o, Exception)}
CALLED = {name for name, thing in PUBLIC.items() if inspect.isroutine(thing)}
EXTENDED = {"Strategy", "TokenStrategy", "Kernel", "Backbone", "Planner", "LearnedPlanner"}
EXTENDED |= {
    "LearnedTokenPlanner",
    "Pattern",
    "Reduction",
    "AttentionInputs",
    "Site",
    "Patch",
    "Recipe",
}


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_every_public_name_is_described(name: str) -> None:
    assert PUBLIC[name].__doc__
    if name in CALLED | EXTENDED:
        text = PUBLIC[name].__doc__ + (getattr(PUBLIC[name], "of", PUBLIC[name]).__doc__ or "")
        assert ">>>" in text, "an example is missing"


def test_every_public_name_is_on_the_reference_page() -> None:
    page = (ROOT / "docs" / "api.md").read_text()
    whole, named = set(), set()
    for place, members in re.findall(r"::: ([\w.]+)(?:\n.*\n.*members: \[(.*?)\])?", page):
        whole.add(place) if not members else named.update(re.split(r",\s*", members))
    for name, thing in PUBLIC.items():
        home = getattr(thing, "__module__", "")
        assert name in named or whole & {home, f"{home}.{name}"}, name


@pytest.mark.parametrize("name", sorted(set(PUBLIC) - FAULTS - {"PLUGIN_API", "hookimpl", "Grid"}))
def test_every_argument_and_field_is_described(name: str) -> None:
    for argument in inspect.signature(PUBLIC[name]).parameters:
        if argument not in ("args", "kwargs"):
            assert re.search(rf"\b{argument}\b", PUBLIC[name].__doc__), argument


@pytest.mark.parametrize("name", sorted(sparsiattn.list_strategies()))
def test_every_option_is_described(name: str) -> None:
    """As ``option:`` or ``option, other:`` in the docstring of the class or of what it extends."""
    kind = REGISTRY.get("strategies", name)
    text = " ".join(inspect.cleandoc(base.__doc__ or "") for base in kind.__mro__[:-1])
    said = {
        option
        for listed in re.findall(r"((?:\w+,\s)*\w+):\s", text)
        for option in re.split(r",\s", listed)
    }
    assert set(kind.option_names()) <= said


def test_tables_are_those_of_the_results() -> None:
    argument: Any = typer.main.get_command(app).commands["profile"].params[0]  # type: ignore[attr-defined]
    if getattr(argument, "help", None) is None:
        pytest.skip("older typer and newer click forget the help of arguments")
    command = [sys.executable, str(ROOT / "benchmarks" / "tables.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_figures_in_readme_and_docs_have_their_files() -> None:
    for path in (ROOT / "README.md", *PAGES):
        for name in re.findall(r"benchmarks/results/[\w.-]+\.json", path.read_text()):
            assert (ROOT / name).is_file(), f"{path.name} cites {name}"
