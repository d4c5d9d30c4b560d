"""The programs under ``tools/pages``, which make the documentation site."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType

from tests.support import ROOT

FOLDER = str(ROOT / "tools" / "pages")


def program(name: str) -> ModuleType:
    """A module of that folder, which sees its neighbours as it does when mkdocs runs it."""
    sys.path.insert(0, FOLDER)
    try:
        return import_module(name)
    finally:
        sys.path.remove(FOLDER)
