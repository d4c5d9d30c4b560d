"""Everything this library raises on purpose derives from `SparsiattnError`.

Each leaf also inherits the built-in exception a caller expects: ``except ValueError`` works.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any


class SparsiattnError(Exception):
    """Root of every error raised by sparsiattn."""


class UnknownName(SparsiattnError, LookupError):
    """A strategy, kernel, backbone, site or option of that name does not exist."""


class InvalidOption(SparsiattnError, ValueError):
    """An option's value is out of range or does not fit the others."""


class InvalidType(SparsiattnError, TypeError):
    """An argument is of the wrong type."""


class NothingToPatch(SparsiattnError, LookupError):
    """The model has no attention that can be reached."""


class ProbeFailed(SparsiattnError, RuntimeError):
    """The dry run that looks for attention calls could not be made."""


class AlreadyPatched(SparsiattnError, RuntimeError):
    """The model carries a live patch."""


class ModelChanged(SparsiattnError, RuntimeError):
    """A patched site was replaced or deleted after patching."""


class KernelRefused(SparsiattnError, RuntimeError):
    """The kernel asked for by name cannot compute this pattern here."""


class MismatchedPatch(SparsiattnError, ValueError):
    """A saved patch does not belong to this model or to this version."""


class ExportFailed(SparsiattnError, RuntimeError):
    """A model cannot be exported, or what was exported answers otherwise than the model."""


class DataError(SparsiattnError, ValueError):
    """Images or labels cannot be read, or do not fit the model."""


class MismatchedCheckpoint(SparsiattnError, ValueError):
    """A checkpoint of training belongs to another run, or cannot be read."""


class CheckpointNotWritten(SparsiattnError, OSError):
    """A checkpoint or log cannot be written; those that were there before are whole."""


class TrainingDiverged(SparsiattnError, FloatingPointError):
    """A loss became NaN or infinite."""


class PluginError(SparsiattnError, RuntimeError):
    """A plug-in returned something that cannot be registered."""


def unknown(kind: str, name: object, known: Iterable[str]) -> UnknownName:
    """An `UnknownName` with close matches and the whole list.

    >>> print(unknown("strategy", "topk2", ["topk", "random"]))
    unknown strategy 'topk2'. Did you mean 'topk'? Known: random, topk
    """
    names = sorted(known)
    close = get_close_matches(str(name), names, n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
    return UnknownName(f"unknown {kind} {name!r}.{hint} Known: {', '.join(names) or 'none'}")


def warn_renamed(old: str, new: str, stacklevel: int = 3) -> None:
    """Say that a public name has another one now; the old one goes with the next minor version."""
    warnings.warn(f"{old} is now {new}", DeprecationWarning, stacklevel=stacklevel)


def renamed_property(old: str, new: str) -> Any:
    """A property that gives the attribute ``new`` under its old name, with a warning."""

    def get(self: Any) -> Any:
        warn_renamed(f"{type(self).__name__}.{old}", new)
        return getattr(self, new)

    return property(get, doc=f"The old name of ``{new}``.")


def first_line(error: BaseException, named: bool = False) -> str:
    """What another library's error says, without the paragraphs that follow.

    Args:
        error: Any error.
        named: Whether its class comes first, as in a traceback.

    >>> first_line(ValueError("no such file. See below:")), first_line(KeyError(), named=True)
    ('no such file. See below:', 'KeyError: ')
    """
    line = next(filter(None, map(str.strip, str(error).splitlines())), "")
    name = type(error).__name__
    return f"{name}: {line}" if named else line or name
