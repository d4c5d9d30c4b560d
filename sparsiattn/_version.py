"""The installed version, apart from the root so that any module may import it."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("sparsiattn")
except PackageNotFoundError:  # run from a source tree that is not installed
    __version__ = "0+unknown"
