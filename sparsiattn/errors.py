"""Everything this library raises on purpose derives from `SparsiattnError`.

Each leaf also inherits the built-in exception a caller expects: ``except ValueError`` works.
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


class GuessedStructure(UserWarning):
    """Grid and special tokens of a sequence follow from its length alone; see `patch`."""


class SlowerThanDense(UserWarning):
    """The patched model is expected to take longer than the dense one; see `patch`."""


class LowAttentionMass(UserWarning):
    """What a patch keeps holds less of exact attention than asked for; see `Patch.monitor`."""


class CalibrationDiscarded(UserWarning):
    """Calibrated planners lose more than what is kept without them; see `calibrate`."""


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


# When old names are removed: those that users type, and those that plug-ins override or call
# (docs/extend.md promises these for longer).
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
    torch = sys.modules.get("torch")  # not imported here: errors are all that `--help` needs
    return torch is not None and torch.compiler.is_compiling()


class RenamedMember:
    """A method or attribute under its old name, with a warning."""

    def __init__(self, old: str, new: str, removed_in: str = REMOVED_IN) -> None:
        self.old, self.new, self.removed_in = old, new, removed_in

    def __get__(self, instance: object, owner: type) -> Any:
        holder: Any = owner if instance is None else instance
        if _is_compiling():  # Dynamo can trace neither a warning nor a look through classes
            return getattr(holder, self.new)
        warn_renamed(f"{owner.__name__}.{self.old}", self.new, self.removed_in)
        # where a subclass overrides the old name, only its super().old can have come here
        overriding = [cls for cls in owner.__mro__ if _overrides(cls, self.old)]
        return getattr(super(overriding[-1], holder) if overriding else holder, self.new)


def renamed_property(old: str, new: str, removed_in: str = REMOVED_IN) -> Any:
    """A class attribute ``old`` that gives the member ``new``, with a warning."""
    return RenamedMember(old, new, removed_in)


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


class RenamedMembers:
    """Base of contracts some of whose members have new names.

    Subclasses that override an old name still work, and so do calls by it, both with a warning.

    Attributes:
        renamed_members: Old names to new ones.

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
    """Whether a class defines that member itself; an option of a dataclass is none."""
    annotation = get_annotations(cls).get(name, "ClassVar")
    return (
        name in vars(cls)
        and not isinstance(vars(cls)[name], RenamedMember)
        and "ClassVar" in str(annotation)
    )
