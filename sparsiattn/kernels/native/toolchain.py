"""Compiles plan.c, which includes the other C files, into a library: compiler and flags.

`build` uses it to compile for this processor, and setup.py to compile for all processors of a
platform. setup.py loads this file on its own, so it imports only the standard library.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
from functools import cache
from pathlib import Path

HERE = Path(__file__).parent
MAIN = "plan.c"
SOURCES = (
    MAIN,
    "attention.c",
    "backward.c",
    "bands.h",
    "biased.c",
    "chunks.c",
    "level.c",
    "lists.c",
    "merge.c",
    "numbers.h",
    "rows.c",
    "threads.c",
    "top.c",
    "vectors.h",
)

WINDOWS = os.name == "nt"
FLAGS = (
    "-O3",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
    "-shared",
    *(() if WINDOWS else ("-fPIC",)),
)
# GCC does not align the stack for wide vectors on Windows
COMPILERS = ("clang", "clang-cl") if WINDOWS else ("cc", "gcc", "clang")
# enough for `cc` with a cold disk cache; a compiler that hangs must not block the caller
SECONDS = 120

# The levels of x86-64's psABI; older compilers know the features but not the names.
_V2 = ("-mcx16", "-msahf", "-mpopcnt", "-msse3", "-mssse3", "-msse4.1", "-msse4.2")
_V3 = (*_V2, "-mavx", "-mavx2", "-mbmi", "-mbmi2", "-mf16c", "-mfma", "-mlzcnt", "-mmovbe")
_V4 = (*_V3, "-mavx512f", "-mavx512bw", "-mavx512cd", "-mavx512dq", "-mavx512vl")
X86: dict[str, tuple[str, ...]] = {"v2": _V2, "v3": _V3, "v4": _V4}
"""Flags of each level of x86-64, lowest first."""
ARM: dict[str, tuple[str, ...]] = {"neon": ("-march=armv8-a",)}
"""Flags for every 64-bit ARM processor."""


def machine() -> str:
    """``"x86"`` or ``"arm"`` for 64-bit processors, else the system's name."""
    # a universal Python on macOS builds for the architecture in ARCHFLAGS
    asked = {"x86_64", "arm64"} & set(os.environ.get("ARCHFLAGS", "").split())
    name = asked.pop() if len(asked) == 1 else platform.machine()
    kinds = {"x86_64": "x86", "amd64": "x86", "arm64": "arm", "aarch64": "arm"}
    return kinds.get(name.lower(), name)


def levels(machine: str) -> dict[str, tuple[str, ...]]:
    """The levels of a machine, lowest first, and the flags of each; empty for unknown machines."""
    known = {"x86": X86, "arm": ARM}
    return known.get(machine, {})


def file_name(level: str) -> str:
    """File name of the library for a level; ``"level"`` is the library that detects the level."""
    return f"{level}.dll" if WINDOWS else f"{level}.so"


def compiler() -> list[str] | None:
    """The command of the C compiler: ``$CC``, else the first one found; None if there is none."""
    command = shlex.split(os.environ.get("CC", ""), posix=not WINDOWS)
    if command:
        return command if shutil.which(command[0]) else None
    program = next((path for name in COMPILERS if (path := shutil.which(name))), None)
    if program is None:
        return None
    # clang-cl is clang with other options by default
    return [program, "--driver-mode=gcc"] if Path(program).stem == "clang-cl" else [program]


def missing() -> str | None:
    """Why no compiler is available; None if one is."""
    if compiler() is not None:
        return None
    name = os.environ.get("CC")
    if name:
        return f"$CC names the C compiler {name!r}, which was not found"
    return f"no C compiler was found ({', '.join(COMPILERS)} or $CC)"


@cache
def sources() -> dict[str, str]:
    """The C code, by file name."""
    return {name: HERE.joinpath(name).read_text(encoding="utf-8") for name in SOURCES}


@cache
def fingerprint() -> str:
    """Hash of the C code. Every library contains it, so that outdated libraries are detected."""
    return hashlib.sha256("\0".join(sources().values()).encode()).hexdigest()[:20]


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a compiler and capture its output.

    Raises:
        subprocess.TimeoutExpired: It did not end in time.
    """
    return subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=SECONDS, errors="replace"
    )


def compile_library(source: Path, flags: tuple[str, ...], target: Path) -> str | None:
    """Compile a library.

    Args:
        source: The file to compile.
        flags: Flags for the processor, and any others.
        target: Path of the library to write.

    Returns:
        Why that failed; None if it succeeded.
    """
    program = compiler()
    if program is None:
        return missing()
    command = [*program, *FLAGS, f'-DFINGERPRINT="{fingerprint()}"', *flags, str(source)]
    command += ["-o", str(target), *(() if WINDOWS else ("-lm",))]
    name = shlex.join(program[:1])
    try:
        completed = run(command)
    except subprocess.TimeoutExpired:
        return f"{name} did not end within {SECONDS} s"
    if completed.returncode or not target.exists():
        output = (completed.stderr or completed.stdout).strip() or "no output"
        return f"{name} failed with status {completed.returncode}: {output.splitlines()[0]}"
    return None


def compile_levels(folder: Path) -> tuple[list[Path], list[str]]:
    """Compile for every level of this machine.

    Args:
        folder: Folder for the libraries; it is created, or emptied if it exists.

    Returns:
        The libraries, and messages about those that could not be compiled.
    """
    shutil.rmtree(folder, ignore_errors=True)
    kind = machine()
    works = [(level, MAIN, flags) for level, flags in levels(kind).items()]
    if not works:
        return [], [f"there is no C code for {kind}"]
    if missing():
        return [], [str(missing())]
    if kind == "x86":
        works.insert(0, ("level", "level.c", ()))
    folder.mkdir(parents=True)
    arch = tuple(os.environ.get("ARCHFLAGS", "").split())
    failures = []
    for level, source, flags in works:
        target = folder / file_name(level)
        why = compile_library(HERE / source, (*arch, *flags), target)
        if why:
            failures.append(f"{level}: {why}")
    return sorted(folder.iterdir()), failures
