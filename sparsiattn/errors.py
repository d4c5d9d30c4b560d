"""The exceptions and warnings of this library.

Every exception derives from `SparsiattnError` and from the built-in exception that fits, so
``except ValueError`` works too.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from inspect import get_annotations
from typing import Any, ClassVar


class SparsiattnError(Exception):
    """Root of every error raised by sparsiattn."""


class UnknownName(SparsiattnError, LookupError):
    """There is no strategy, kernel, backbone, site or option of this name."""


class InvalidOption(SparsiattnError, ValueError):
    """The value of an option is out of range or does not fit the other options."""


class InvalidType(SparsiattnError, TypeError):
    """An argument is of the wrong type."""


class NothingToPatch(SparsiattnError, LookupError):
    """The model has no attention that can be patched."""


class ProbeFailed(SparsiattnError, RuntimeError):
    """The dry run that looks for attention calls failed."""


class AlreadyPatched(SparsiattnError, RuntimeError):
    """The model has an active patch."""


class ModelChanged(SparsiattnError, RuntimeError):
    """The model or the way it is called no longer fits the patch."""


class KernelRefused(SparsiattnError, RuntimeError):
    """The kernel asked for by name cannot compute this pattern here."""


class MismatchedPatch(SparsiattnError, ValueError):
    """A saved patch does not belong to this model or to this version."""


class ExportFailed(SparsiattnError, RuntimeError):
    """A model cannot be exported, or the exported program returns other values than the model."""


class DataError(SparsiattnError, ValueError):
    """Images or labels cannot be read, or do not fit the model."""


class MismatchedCheckpoint(SparsiattnError, ValueError):
    """A training checkpoint belongs to another run or cannot be read."""


class CheckpointNotWritten(SparsiattnError, OSError):
    """A checkpoint or log cannot be written; files written earlier are intact."""


class TrainingDiverged(SparsiattnError, FloatingPointError):
    """A loss became NaN or infinite."""


class GuessedStructure(UserWarning):
    """Grid and special tokens of a sequence were guessed from its length; see `patch`."""


class SlowerThanDense(UserWarning):
    """The patched model is expected to be slower than the dense one; see `patch`."""


class LowAttentionMass(UserWarning):
    """The kept keys hold less of exact attention than the bound; see `Patch.monitor`."""


class CalibrationDiscarded(UserWarning):
    """Calibrated planners lose more attention than uncalibrated ones; see `calibrate`."""


class PluginError(SparsiattnError, RuntimeError):
    """A plug-in returned an object that cannot be registered."""


def unknown(kind: str, name: object, known: Iterable[str]) -> UnknownName:
    """An `UnknownName` error that lists close matches and all known names.

    >>> print(unknown("strategy", "topk2", ["topk", "random"]))
    unknown strategy 'topk2'. Did you mean 'topk'? Known: random, topk
    """
    names = sorted(known)
    close = get_close_matches(str(name), names, n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
    return UnknownName(f"unknown {kind} {name!r}.{hint} Known: {', '.join(names) or 'none'}")


# When old names are removed: those that users type, and those that plug-ins override or call
# (docs/tutorials/plugin.md promises these for longer).
REMOVED_IN = "0.3.0"
PLUGIN_REMOVED_IN = "plug-in API 2.0"


def warn_renamed(old: str, new: str, removed_in: str = REMOVED_IN, *, stacklevel: int = 3) -> None:
    """Warn that a public name has changed.

    Args:
        old: The name that was used.
        new: The name to use instead.
        removed_in: The version that removes the old name. ``CHANGELOG.md`` lists both.
        stacklevel: Of `warnings.warn`: 3 is the caller of the function that calls this one.
    """
    message = f"{old} is now {new}; the old name is removed in {removed_in}"
    warnings.warn(message, DeprecationWarning, stacklevel=stacklevel)


def _is_compiling() -> bool:
    torch = sys.modules.get("torch")  # not imported here, so that `--help` stays fast
    return torch is not None and torch.compiler.is_compiling()


class RenamedMember:
    """Descriptor that gives access to a method or attribute by its old name, with a warning."""

    def __init__(self, old: str, new: str, removed_in: str = REMOVED_IN) -> None:
        self.old, self.new, self.removed_in = old, new, removed_in

    def __get__(self, instance: object, owner: type) -> Any:
        holder: Any = owner if instance is None else instance
        if _is_compiling():  # Dynamo can trace neither a warning nor a search through classes
            return getattr(holder, self.new)
        warn_renamed(f"{owner.__name__}.{self.old}", self.new, self.removed_in)
        # if a subclass overrides the old name, only its call of super().old gets here
        overriding = [cls for cls in owner.__mro__ if _overrides(cls, self.old)]
        return getattr(super(overriding[-1], holder) if overriding else holder, self.new)


def renamed_property(old: str, new: str, removed_in: str = REMOVED_IN) -> Any:
    """A class attribute ``old`` that returns the member ``new``, with a warning."""
    return RenamedMember(old, new, removed_in)


def first_line(error: BaseException, named: bool = False) -> str:
    """The first line of an error message.

    Args:
        error: Any error.
        named: Whether to start with the name of its class, as in a traceback.

    >>> first_line(ValueError("no such file. See below:")), first_line(KeyError(), named=True)
    ('no such file. See below:', 'KeyError: ')
    """
    line = next(filter(None, map(str.strip, str(error).splitlines())), "")
    name = type(error).__name__
    return f"{name}: {line}" if named else line or name


class RenamedMembers:
    """Base of contracts with renamed members.

    Subclasses that override an old name and calls by an old name still work, with a warning.

    Attributes:
        renamed_members: New names by old names.

    >>> import warnings
    >>> class Shape(RenamedMembers):
    ...     renamed_members = {"sides": "edges"}
    ...     def edges(self):
    ...         return 0
    >>> with warnings.catch_warnings():
    ...     warnings.simplefilter("ignore")  # Square.sides is now edges
    ...     class Square(Shape):
    ...         def sides(self):
    ...             return 4
    >>> Square().edges()
    4
    """

    renamed_members: ClassVar[Mapping[str, str]] = {}

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for old in vars(cls).get("renamed_members", ()):
            setattr(cls, old, RenamedMember(old, cls.renamed_members[old], PLUGIN_REMOVED_IN))
        for old, new in cls.renamed_members.items():
            if _overrides(cls, old) and new not in vars(cls):
                warn_renamed(f"{cls.__name__}.{old}", new, PLUGIN_REMOVED_IN)
                setattr(cls, new, vars(cls)[old])


def _overrides(cls: type, name: str) -> bool:
    """Whether a class itself defines this member; dataclass fields do not count."""
    annotation = get_annotations(cls).get(name, "ClassVar")
    return (
        name in vars(cls)
        and not isinstance(vars(cls)[name], RenamedMember)
        and "ClassVar" in str(annotation)
    )
