"""pytest plug-in: ``pytest --sparsiattn-suite my_package`` runs sparsiattn's conformance suites.

The suites run on every strategy, kernel and backbone that the package's entry points register. This
module is separate from the library because pytest always loads it: without the option, neither the
library nor torch is imported.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

OPTION = "--sparsiattn-suite"
_package = ""

if "sparsiattn.testing" not in sys.modules:  # pytest warns about modules that are imported already
    pytest.register_assert_rewrite("sparsiattn.testing")


def package() -> str:
    """The package that the option names; empty without the option."""
    return _package


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("sparsiattn")
    group.addoption(
        OPTION,
        metavar="PACKAGE",
        default="",
        help="run sparsiattn's conformance suites on everything that an installed package "
        "registers; PACKAGE is a distribution, entry point or import name ('sparsiattn' for the "
        "built-ins)",
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
        config.args = [suites]  # no other tests were requested
    elif suites not in config.args:
        config.args = [*config.args, suites]


def _suites() -> Path:
    import sparsiattn.testing

    return Path(sparsiattn.testing.__file__).with_name("collected.py")


def _check(package: str) -> None:
    """Raise an error for a package without plug-ins, as an empty run would look successful."""
    from sparsiattn.registry import REGISTRY

    if REGISTRY.of_package(package):
        return
    known = sorted({plugin.distribution for plugin in REGISTRY.plugins()})
    raise pytest.UsageError(
        f"{OPTION} {package}: no plug-in of that name is installed. Known: {', '.join(known)}; a "
        "package must have an entry point in the group 'sparsiattn' (see `sparsiattn list`)"
    )


def pytest_pycollect_makemodule(module_path: Path, parent: Any) -> Any:
    """Make test ids start with the package instead of the path of sparsiattn."""
    if not _package or module_path != _suites():
        return None
    return pytest.Module.from_parent(parent, path=module_path, nodeid=_package)
