"""The root: lazy, complete, and the names of earlier versions with a warning."""

from __future__ import annotations

import ast
import pkgutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import sparsiattn

RENAMED = {
    "Bench": "BenchResult",
    "Exported": "ExportResult",
    "LearnedTokens": "LearnedTokenPlanner",
    "Shown": "AttentionView",
}


STUB = Path(sparsiattn.__file__).with_suffix(".pyi")


def typed_names() -> dict[str, str]:
    """Name to module, as type checkers read them."""
    tree = ast.parse(STUB.read_text(encoding="utf-8"))
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    return {
        alias.asname or "": f"sparsiattn.{node.module}" for node in imports for alias in node.names
    }


NAMES = typed_names()


def test_type_checkers_see_what_is_imported() -> None:
    assert sorted(NAMES) == sparsiattn.__all__


@pytest.mark.parametrize("name", sparsiattn.__all__)
def test_every_name_is_there(name: str) -> None:
    assert getattr(sparsiattn, name) is getattr(import_module(NAMES[name]), name)


def test_dir_shows_public_names_only() -> None:
    assert [name for name in dir(sparsiattn) if not name.startswith("__")] == sparsiattn.__all__


def test_star_import_brings_the_public_names() -> None:
    names: dict[str, object] = {}
    exec("from sparsiattn import *", names)
    assert sorted(set(names) - {"__builtins__"}) == sparsiattn.__all__


def test_no_subpackage_bears_the_name_of_a_public_function() -> None:
    modules = {module.name for module in pkgutil.iter_modules(sparsiattn.__path__)}
    assert not modules & set(sparsiattn.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'NoSuchName'"):
        sparsiattn.NoSuchName  # type: ignore[attr-defined]  # noqa: B018


def python(code: str) -> str:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_packages_are_reached_from_the_root() -> None:
    assert python("import sparsiattn; print(sparsiattn.kernels.reference.Reference.name)") == (
        "reference"
    )


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_the_command_line_answers_without_torch(option: str) -> None:
    code = (
        "import sys, sparsiattn.cli as cli\n"
        f"cli.app([{option!r}], standalone_mode=False)\n"
        "print([name for name in ('torch', 'timm', 'pluggy') if name in sys.modules])"
    )
    lines = python(code).splitlines()
    assert lines[-1] == "[]"
    assert option == "--help" or lines[0] == f"sparsiattn {sparsiattn.__version__}"


@pytest.mark.parametrize("kind", ["strategies", "kernels", "backbones", "plugins"])
def test_old_listing_functions_warn(kind: str) -> None:
    with pytest.warns(DeprecationWarning, match=f"list_{kind}"):
        listing = getattr(sparsiattn, kind)()
    assert listing == getattr(sparsiattn, f"list_{kind}")()


@pytest.mark.parametrize("name", RENAMED)
def test_old_class_names_warn(name: str) -> None:
    with pytest.warns(DeprecationWarning, match=f"sparsiattn.{name} is now") as caught:
        old = getattr(sparsiattn, name)
    assert caught[0].filename == __file__
    assert old is getattr(sparsiattn, RENAMED[name])
