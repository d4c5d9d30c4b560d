"""pytest plug-in: ``pytest --sparsiattn-suite my_package`` runs sparsiattn's conformance suites.

They run over every strategy, kernel and backbone that the package's entry points register. Outside
of the library, because importing that imports torch, and pytest loads this wherever it is
installed: without the option nothing else is imported.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

OPTION = "--sparsiattn-suite"
_package = ""

if "sparsiattn.testing" not in sys.modules:  # else it is too late, and pytest warns
    pytest.register_assert_rewrite("sparsiattn.testing")


def package() -> str:
    """The package that was asked for, empty if none was."""
    return _package


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("sparsiattn")
    group.addoption(
        OPTION,
        metavar="PACKAGE",
        default="",
        help="run sparsiattn's conformance suites over what this installed package registers: by "
        "distribution, entry point or import name ('sparsiattn' for the built-ins)",
    )


def pytest_configure(config: pytest.Config) -> None:
    global _package
    config.addinivalue_line("markers", "slow: takes long (sparsiattn's suites: compile, export)")
    _package = config.getoption(OPTION)
    if not _package:
        return
    _check(_package)
    suites = str(_suites())
    source = pytest.Config.ArgsSource
    if config.args_source in (source.INVOCATION_DIR, source.TESTPATHS):
        config.args = [suites]  # nothing else was asked for
    elif suites not in config.args:
        config.args = [*config.args, suites]


def _suites() -> Path:
    import sparsiattn.testing

    return Path(sparsiattn.testing.__file__).with_name("collected.py")


def _check(package: str) -> None:
    """Nothing found is an error: it must not pass for a run without failures."""
    from sparsiattn.registry import REGISTRY

    if REGISTRY.of_package(package):
        return
    known = sorted({plugin.distribution for plugin in REGISTRY.plugins()})
    raise pytest.UsageError(
        f"{OPTION} {package}: no plug-in of that name is installed. Known: {', '.join(known)}; an "
        "entry point in the group 'sparsiattn' makes a package known (see `sparsiattn list`)"
    )


def pytest_pycollect_makemodule(module_path: Path, parent: Any) -> Any:
    """Ids that begin with the package instead of with where sparsiattn is installed."""
    if not _package or module_path != _suites():
        return None
    return pytest.Module.from_parent(parent, path=module_path, nodeid=_package)
