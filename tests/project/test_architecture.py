"""The layout: imports go one way, and packages hide neither modules nor public functions."""

from __future__ import annotations

import ast
import inspect
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

import sparsiattn
from tests.support import ROOT, environment

PACKAGE = ROOT / "sparsiattn"
PACKAGES = sorted(path.parent for path in PACKAGE.glob("*/__init__.py"))
SUBPACKAGES = sorted(path.parent for path in PACKAGE.glob("*/**/__init__.py"))
MODULES = sorted([*PACKAGE.rglob("*.py"), *(ROOT / "backbones").rglob("*.py")])
# Modules that import another of the library late, because that one needs what is optional.
LATE = {"kernels/_triton/ops.py": "triton", "kernels/_triton/plan_ops.py": "triton"}
LINTER = """
import sys
from importlinter.cli import lint_imports
sys.exit(lint_imports(limit_to_contracts=(sys.argv[1],), no_cache=True))
"""

needs_linter = pytest.mark.skipif(not find_spec("importlinter"), reason="needs import-linter")


def name_of(path: Path) -> str:
    return str(path.relative_to(PACKAGE.parent))


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def check(contract: str, root: Path = ROOT) -> str:
    """What the linter prints about one contract in a checkout; its exit status is in there too."""
    # a process of its own: the linter reads the packages that this one has imported
    process = subprocess.run(
        [sys.executable, "-c", LINTER, contract],
        cwd=root,
        env=environment(PYTHONPATH=str(root / "backbones"), NO_COLOR="1"),
        capture_output=True,
        text=True,
        check=False,
    )
    kept = process.returncode == 0
    assert f"Contracts: {int(kept)} kept, {int(not kept)} broken" in process.stdout, process.stderr
    return process.stdout


@needs_linter
@pytest.mark.parametrize("contract", ["layers", "public-names", "no-circles"])
def test_contracts_hold(contract: str) -> None:
    output = check(contract)
    assert "1 kept, 0 broken" in output, output


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The modules and the contracts, to write wrong imports into."""
    for path in MODULES:
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


SITE, INPUTS = "sparsiattn/attention/site.py", "sparsiattn.attention.inputs"
TYPING = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    "


WRONG = {
    "upwards": ("layers", SITE, "from sparsiattn.patching import patch"),
    "upwards-late": ("layers", SITE, "def f():\n    import sparsiattn.kernels"),
    "upwards-types": ("layers", SITE, f"{TYPING}from sparsiattn.runtime import Timing"),
    "sideways": ("layers", "sparsiattn/registry/listing.py", "import sparsiattn.attention"),
    "from-errors": ("layers", "sparsiattn/errors.py", "from sparsiattn.attention import Site"),
    "new-package": ("layers", "sparsiattn/thirteenth/__init__.py", ""),
    "circle": ("no-circles", SITE, f"import {INPUTS}"),
    "circle-late": ("no-circles", SITE, f"def f():\n    import {INPUTS}"),
    "circle-types": ("no-circles", SITE, f"{TYPING}import {INPUTS}"),
    "method": ("public-names", "sparsiattn/methods/atc.py", f"import {INPUTS}"),
    "backbone": ("public-names", "backbones/sparsiattn_backbones/stems.py", f"import {INPUTS}"),
}


@needs_linter
@pytest.mark.parametrize(("contract", "path", "code"), WRONG.values(), ids=WRONG)
def test_a_wrong_import_breaks_a_contract(
    checkout: Path, contract: str, path: str, code: str
) -> None:
    module = checkout / path
    module.parent.mkdir(exist_ok=True)
    with module.open("a", encoding="utf-8") as file:
        file.write(f"\n{code}\n")
    output = check(contract, checkout)
    assert "0 kept, 1 broken" in output
    package = Path(path).parent.name if module.name != "errors.py" else "errors"
    assert package in output.partition("Broken contracts")[2], "for another reason"


def test_there_are_at_most_twelve_packages() -> None:
    assert len(PACKAGES) <= 12
    others = {path.name for path in PACKAGE.iterdir()} - {path.name for path in PACKAGES}
    others -= {"__pycache__", "__init__.pyi"}
    assert others == {"__init__.py", "__main__.py", "_version.py", "errors.py", "py.typed"}


@pytest.mark.parametrize("package", PACKAGES, ids=name_of)
def test_packages_say_what_lives_in_them(package: Path) -> None:
    text = ast.get_docstring(parse(package / "__init__.py")) or ""
    assert len(text.splitlines()) >= 3
    assert "import" in text, "say what it may import, or what may import it"


def test_no_package_bears_the_name_of_a_public_function() -> None:
    public = {name: getattr(sparsiattn, name) for name in sparsiattn.__all__}
    functions = {name for name, value in public.items() if inspect.isroutine(value)}
    assert not functions & {package.name for package in SUBPACKAGES}


@pytest.mark.parametrize("package", SUBPACKAGES, ids=name_of)
def test_packages_export_no_name_of_their_modules(package: Path) -> None:
    """The name would hide the module: ``import a.b.c as c`` gave the function."""
    exported = set()
    for node in parse(package / "__init__.py").body:
        if isinstance(node, ast.ImportFrom | ast.Import):
            exported |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            exported.add(node.name)
    modules = {path.stem for path in package.glob("*.py")}
    assert not exported & (modules | {path.parent.name for path in package.glob("*/__init__.py")})


def late_imports(path: Path) -> Iterator[str]:
    """Imports of the library inside a function."""
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    for function in (node for node in ast.walk(parse(path)) if isinstance(node, functions)):
        for node in ast.walk(function):
            if isinstance(node, ast.ImportFrom):
                modules = ["sparsiattn." if node.level else node.module or ""]
            else:
                modules = [x.name for x in node.names] if isinstance(node, ast.Import) else []
            if any(name.partition(".")[0].startswith("sparsiattn") for name in modules):
                yield f"{path.name}:{node.lineno}: {ast.unparse(node)}"


def test_no_import_hides_inside_a_function() -> None:
    """But in commands, whose help must not import torch."""
    allowed = [PACKAGE / "cli", *(PACKAGE / path for path in LATE)]
    modules = [path for path in MODULES if not any(path.is_relative_to(place) for place in allowed)]
    assert [line for path in modules for line in late_imports(path)] == []
    assert all(list(late_imports(PACKAGE / path)) for path in LATE), "no longer late"


def test_files_stay_short() -> None:
    """One idea a file: what grows past this is cut by idea, not by size."""
    long = [path for path in MODULES if len(path.read_text().splitlines()) >= 400]
    assert [path.relative_to(ROOT).as_posix() for path in long] == []


def code_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without its docstring."""
    first, documented = function.body[0], ast.get_docstring(function)
    said = first.end_lineno - first.lineno + 1 if documented else 0  # type: ignore[operator]
    return function.end_lineno - function.lineno + 1 - said  # type: ignore[operator]


def test_functions_stay_short() -> None:
    """At most 60 lines, but for kernels of Triton; half of all functions below ten."""
    lengths = {
        (str(path.relative_to(ROOT)), node.name, node.lineno): code_lines(node)
        for path in (ROOT / "sparsiattn").rglob("*.py")
        if "_triton" not in path.parts
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    }
    assert [name for name, lines in lengths.items() if lines > 60] == []
    assert statistics.median(lengths.values()) < 10
