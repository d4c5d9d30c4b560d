"""Imports of optional libraries of kernels: on first use, and without a word on the terminal."""

from __future__ import annotations

import importlib
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sparsiattn.errors import first_line


def load(home: str) -> tuple[Any, str]:
    """Import a module of a library that may be missing.

    A wheel for another CUDA or torch version may raise any error on import.

    Args:
        home: The module, as in ``"xformers.ops.fmha"``.

    Returns:
        The module and an empty text; or None, and why it cannot be imported.
    """
    name = home.partition(".")[0]
    try:
        with silence(name):
            return importlib.import_module(home), ""
    except ModuleNotFoundError as error:
        if error.name == name:
            return None, f"{name} is not installed"
        return None, f"{name} needs {error.name}, which is not installed"
    except Exception as error:
        return None, f"{name} cannot be imported ({first_line(error)})"


@contextmanager
def silence(name: str) -> Iterator[None]:
    """Suppress the warnings and the log of the library of this name."""
    loggers = [logging.getLogger(name), logging.getLogger(f"{name}_fmha")]
    before = [logger.disabled for logger in loggers]
    for logger in loggers:
        logger.disabled = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, was in zip(loggers, before, strict=True):
            logger.disabled = was
