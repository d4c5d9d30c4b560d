"""The documentation cannot drift: its code runs, its names exist, every hook is described."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

import sparsiattn
from sparsiattn.cli import app
from sparsiattn.registry import REGISTRY, hookspecs
from tests.support import ROOT
from tests.support.pages import program

SNIPPETS = program("snippets")
REFERENCE = program("reference")
PAGES = sorted((ROOT / "docs").rglob("*.md"))
TEXTS = [*PAGES, *(ROOT / f"{name}.md" for name in ("CONTRIBUTING", "README", "CHANGELOG"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_code_on_the_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    list(SNIPPETS.printed(page.name, page.read_text()))


def test_every_hook_is_documented() -> None:
    text = "".join(page.read_text() for page in PAGES)
    for name in vars(hookspecs):
        if name.startswith("sparsiattn_"):
            assert name in text


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: text.stem)
def test_files_that_are_named_exist(text: Path) -> None:
    roots = "sparsiattn|backbones|tests|benchmarks|examples|tools|docs"
    for name in re.findall(rf"[`\s(]((?:{roots})/[\w./-]*)", text.read_text()):
        assert (ROOT / name.rstrip(".")).exists(), name


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "docs/concepts.md"])
def test_names_beside_files_are_found_there(name: str) -> None:
    """In a row, an item or a paragraph that names files, other names in code stand in these."""
    text = re.sub(r"```.*?```", "", (ROOT / name).read_text(), flags=re.DOTALL)
    for part in re.split(r"\n\n|\n(?=\||\d+\. )", text):
        code = re.findall(r"`([^`]+)`", part)
        files = [ROOT / word for word in code if re.fullmatch(r"[\w./]+\.py", word)]
        content = "".join(file.read_text() for file in files)
        for word in code if files else ():
            if re.fullmatch(r"[A-Za-z_]\w*(\.\w+)*", word):
                assert re.search(rf"\b{word.split('.')[-1]}\b", content), word


PUBLIC = {name: getattr(sparsiattn, name) for name in sparsiattn.__all__}
ALIASES = {"Grid", "MetaInputs", "PLUGIN_API", "Pooling"}  # values, without docstrings of their own
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


@pytest.mark.parametrize("name", sorted(set(PUBLIC) - ALIASES))
def test_every_public_name_is_described(name: str) -> None:
    assert PUBLIC[name].__doc__
    if name in CALLED | EXTENDED:
        text = PUBLIC[name].__doc__ + (getattr(PUBLIC[name], "of", PUBLIC[name]).__doc__ or "")
        assert ">>>" in text, "an example is missing"


def test_every_public_name_has_one_entry_in_the_reference() -> None:
    text = "".join(page.read_text() for page in (ROOT / "docs" / "reference").glob("*.md"))
    entries = re.findall(r"^::: sparsiattn\.(\w+)$", text, re.MULTILINE)
    assert sorted({*entries} & {*PUBLIC}) == sorted(PUBLIC)
    assert len(entries) == len(set(entries))


@pytest.mark.parametrize("name", sorted(set(PUBLIC) - FAULTS - ALIASES - {"hookimpl"}))
def test_every_argument_and_field_is_described(name: str) -> None:
    """In the docstring of a function, or of a class or one that it extends."""
    bases = PUBLIC[name].__mro__[:-1] if inspect.isclass(PUBLIC[name]) else [PUBLIC[name]]
    text = "".join(base.__doc__ or "" for base in bases)
    for argument in inspect.signature(PUBLIC[name]).parameters:
        if argument not in ("args", "kwargs"):
            assert re.search(rf"\b{argument}\b", text), argument


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


def entry_of(name: str) -> str:
    """What the pages of the reference say of a strategy, from its heading to the next."""
    pages = sorted((ROOT / "docs" / "reference").glob("*.md"))
    text = "\n".join(REFERENCE.filled(page.read_text()) for page in pages)
    found: list[str] = re.findall(rf"^## `{name}` .*?(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    assert len(found) == 1, f"{len(found)} entries"
    return found[0]


@pytest.mark.parametrize("name", sorted(sparsiattn.list_strategies()))
def test_every_strategy_is_in_the_reference_with_all_options_and_defaults(name: str) -> None:
    kind = REGISTRY.get("strategies", name)
    rows = re.findall(r"^\| `(\w+)` \| `(.*?)` \| (.*) \|$", entry_of(name), re.MULTILINE)
    arguments = inspect.signature(kind).parameters
    expected = {option: repr(arguments[option].default) for option in kind.option_names()}
    assert {option: default for option, default, _ in rows} == expected
    assert all(meaning for *_, meaning in rows)


def test_old_addresses_of_the_reference_lead_to_entries() -> None:
    """Names and the modules that define them were anchors of the page `api.md`."""
    page = REFERENCE.filled((ROOT / "docs" / "api.md").read_text())
    for old in ("sparsiattn.patch", "sparsiattn.patching.handle.Patch", "sparsiattn.Site"):
        assert f'id="{old}"' in page
    assert '"sparsiattn.patching.handle.Patch": "patching/#sparsiattn.Patch"' in page


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
