"""Libraries that come with the package, one for each processor level; setup.py compiles them.

``$SPARSIATTN_NATIVE`` selects the code that may run: ``off`` for none, ``v2``, ``v3``, ``v4`` or
``neon`` for that library only, ``local`` for code compiled on this machine only. If it is not set,
the best library for the processor is used.
"""

from __future__ import annotations

import os
from typing import NamedTuple

from sparsiattn.errors import InvalidOption
from sparsiattn.kernels.native import toolchain
from sparsiattn.kernels.native.entries import Code, load, open_library

VARIABLE = "SPARSIATTN_NATIVE"
FOLDER = toolchain.HERE / "lib"
LEVELS = (*toolchain.X86, *toolchain.ARM)
VALUES = ("off", *LEVELS, "local")


class Found(NamedTuple):
    """The result of the search for a library.

    Attributes:
        code: The functions; None if no library can be used.
        level: Processor level of the library; empty if there is none.
        faults: Why other libraries could not be used.
    """

    code: Code | None
    level: str
    faults: tuple[str, ...]


def wanted() -> str:
    """The value of ``$SPARSIATTN_NATIVE``; empty if it is not set.

    Raises:
        InvalidOption: The value is unknown.
    """
    value = os.environ.get(VARIABLE, "")
    if value and value not in VALUES:
        raise InvalidOption(
            f"{VARIABLE} must be one of {', '.join(VALUES)} or unset, got {value!r}"
        )
    return value


def find() -> Found:
    """The best library that is allowed and can be loaded."""
    asked, faults = wanted(), list[str]()
    if asked in ("off", "local"):
        return Found(None, "", ())
    suiting, problem = _suiting()
    if problem:
        return Found(None, "", (problem,) if asked or _are_there() else ())
    for level in (asked,) if asked else suiting:
        path = FOLDER / toolchain.file_name(level)
        if asked and level not in suiting:
            faults.append(f"{VARIABLE}={level} does not run on this processor")
        elif path.exists():
            opened = open_library(path)
            if isinstance(opened, Code):
                return Found(opened, level, tuple(faults))
            faults.append(f"the shipped library {opened}")
        elif asked:
            faults.append(f"{VARIABLE}={level} is set, but this installation has no such library")
    return Found(None, "", tuple(faults))


def _are_there() -> bool:
    return any(FOLDER.joinpath(toolchain.file_name(level)).exists() for level in LEVELS)


def _suiting() -> tuple[list[str], str]:
    """Levels that this processor supports, best first, and why they could not be determined."""
    kind = toolchain.machine()
    levels = list(toolchain.levels(kind))
    if kind != "x86":
        return levels, ""
    path = FOLDER / toolchain.file_name("level")
    try:
        # level 2 of the psABI is "v2", the first entry
        levels = levels[: load(path).sparsiattn_level() - 1]
    except (OSError, AttributeError) as error:
        return [], f"the processor's level could not be determined: {error}"
    return levels[::-1], ""
