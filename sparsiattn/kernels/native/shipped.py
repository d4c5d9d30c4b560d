"""Libraries that came with the package, one for each level of processor; setup.py compiles them.

``$SPARSIATTN_NATIVE`` says which code may run: ``off`` for none, ``v2``, ``v3``, ``v4`` or ``neon``
for that library alone, ``local`` for code compiled on this machine alone. Without it the best
library that suits the processor is taken.
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
    """What the search for a library came to.

    Attributes:
        code: The functions; None where no library can be used.
        level: Of the library that was taken.
        faults: What is wrong with others.
    """

    code: Code | None
    level: str
    faults: tuple[str, ...]


def wanted() -> str:
    """The value of ``$SPARSIATTN_NATIVE``; empty where it is not set.

    Raises:
        InvalidOption: There is no such value.
    """
    value = os.environ.get(VARIABLE, "")
    if value and value not in VALUES:
        raise InvalidOption(f"{VARIABLE}={value!r}; it takes {', '.join(VALUES)}, or is not set")
    return value


def find() -> Found:
    """The best library that may run and loads."""
    asked, faults = wanted(), list[str]()
    if asked in ("off", "local"):
        return Found(None, "", ())
    suiting, problem = _suiting()
    if problem:
        return Found(None, "", (problem,) if asked or _are_there() else ())
    for level in (asked,) if asked else suiting:
        path = FOLDER / toolchain.file_name(level)
        if asked and level not in suiting:
            faults.append(f"{VARIABLE}={level} is not for this processor")
        elif path.exists():
            opened = open_library(path)
            if isinstance(opened, Code):
                return Found(opened, level, tuple(faults))
            faults.append(f"the shipped library {opened}")
        elif asked:
            faults.append(f"{VARIABLE}={level}, but this installation has no such library")
    return Found(None, "", tuple(faults))


def _are_there() -> bool:
    return any(FOLDER.joinpath(toolchain.file_name(level)).exists() for level in LEVELS)


def _suiting() -> tuple[list[str], str]:
    """Levels that this processor has, the best first, and why none could be found out."""
    kind = toolchain.machine()
    levels = list(toolchain.levels(kind))
    if kind != "x86":
        return levels, ""
    path = FOLDER / toolchain.file_name("level")
    try:
        # of the psABI's levels 2 is "v2"
        levels = levels[: load(path).sparsiattn_level() - 1]
    except (OSError, AttributeError) as error:
        return [], f"the processor's level is not known: {error}"
    return levels[::-1], ""
