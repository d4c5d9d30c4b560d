"""The methods are plug-ins: they use the library through its public names and nothing else."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import sparsiattn
import sparsiattn.methods

FOLDER = Path(sparsiattn.methods.__file__).parent
FILES = sorted(FOLDER.glob("**/*.py"))


def private_imports(source: str) -> list[str]:
    """What a method's source imports from the library that is neither public nor a sibling."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names if a.name.split(".")[0] == "sparsiattn"]
        elif isinstance(node, ast.ImportFrom):
            found += _private_names(node)
    return found


def _private_names(node: ast.ImportFrom) -> list[str]:
    module, names = node.module or "", [alias.name for alias in node.names]
    if node.level > 1:
        return ["." * node.level + module]
    if (
        node.level == 1
        or module == "sparsiattn.methods"
        or module.startswith("sparsiattn.methods.")
    ):
        return []
    if module == "sparsiattn":
        return [f"sparsiattn.{name}" for name in names if name not in sparsiattn.__all__]
    return [module] if module.split(".")[0] == "sparsiattn" else []


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_methods_use_public_names_only(file):
    assert private_imports(file.read_text()) == []


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from sparsiattn import Pattern, geometry", ["sparsiattn.attention.geometry"]),
        ("import sparsiattn.kernels as k", ["sparsiattn.kernels"]),
        (
            "def f():\n    from sparsiattn.attention.pattern import Mask",
            ["sparsiattn.attention.pattern"],
        ),
        ("from .. import geometry", [".."]),
        ("from ..patterns import Mask", ["..patterns"]),
        ("from sparsiattn.methodsx import a", ["sparsiattn.methodsx"]),
        ("import torch\nfrom . import _tables\nfrom sparsiattn.methods._fixed import laid", []),
    ],
)
def test_a_private_import_would_be_found(source, found):
    assert private_imports(source) == found


def test_every_method_is_registered():
    """Each class that a file of the package defines as a method is found by its name."""
    for kind in (*sparsiattn.methods.ATTENTION, *sparsiattn.methods.TOKENS):
        assert sparsiattn.list_strategies()[kind.name] is not None
        assert kind.paper.startswith("https://") or kind.fidelity.startswith("inspired by")
        assert kind.fidelity.startswith(("as published", "inspired by"))
