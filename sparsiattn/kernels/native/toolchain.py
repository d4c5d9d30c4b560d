"""How plan.c, and what it includes, becomes a library: by which compiler, with which flags.

Shared by `build`, which compiles for the processor at hand, and by setup.py, which compiles for all
processors of a platform and loads this file alone: it imports nothing but Python's own library.
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
# ample for `cc` with a cold disk; a compiler that hangs must not hang the caller
SECONDS = 120

# What x86-64's psABI calls levels; older compilers know the features, not the names.
_V2 = ("-mcx16", "-msahf", "-mpopcnt", "-msse3", "-mssse3", "-msse4.1", "-msse4.2")
_V3 = (*_V2, "-mavx", "-mavx2", "-mbmi", "-mbmi2", "-mf16c", "-mfma", "-mlzcnt", "-mmovbe")
_V4 = (*_V3, "-mavx512f", "-mavx512bw", "-mavx512cd", "-mavx512dq", "-mavx512vl")
X86: dict[str, tuple[str, ...]] = {"v2": _V2, "v3": _V3, "v4": _V4}
"""Flags of each level of x86-64, the least first."""
ARM: dict[str, tuple[str, ...]] = {"neon": ("-march=armv8-a",)}
"""Flags for every 64-bit ARM."""


def machine() -> str:
    """``"x86"`` or ``"arm"`` of 64 bits, else what the system calls it."""
    # on macOS an interpreter for both builds for the one that is asked for
    asked = {"x86_64", "arm64"} & set(os.environ.get("ARCHFLAGS", "").split())
    name = asked.pop() if len(asked) == 1 else platform.machine()
    kinds = {"x86_64": "x86", "amd64": "x86", "arm64": "arm", "aarch64": "arm"}
    return kinds.get(name.lower(), name)


def levels(machine: str) -> dict[str, tuple[str, ...]]:
    """Levels of a machine, the least first, and the flags of each; none for machines of others."""
    known = {"x86": X86, "arm": ARM}
    return known.get(machine, {})


def file_name(level: str) -> str:
    """Of the library for a level; ``"level"`` for the one that tells which level there is."""
    return f"{level}.dll" if WINDOWS else f"{level}.so"


def compiler() -> list[str] | None:
    """The command of the C compiler: ``$CC``, else the first there is; None if there is none."""
    command = shlex.split(os.environ.get("CC", ""), posix=not WINDOWS)
    if command:
        return command if shutil.which(command[0]) else None
    found = next((path for name in COMPILERS if (path := shutil.which(name))), None)
    if found is None:
        return None
    # clang-cl is clang that takes other options by default
    return [found, "--driver-mode=gcc"] if Path(found).stem == "clang-cl" else [found]


def missing() -> str | None:
    """Why there is no compiler; None if there is one."""
    if compiler() is not None:
        return None
    name = os.environ.get("CC")
    if name:
        return f"$CC names the C compiler {name!r}, which is not there"
    return f"no C compiler was found ({', '.join(COMPILERS)} or $CC)"


@cache
def sources() -> dict[str, str]:
    """The C code, by file name."""
    return {name: HERE.joinpath(name).read_text(encoding="utf-8") for name in SOURCES}


@cache
def fingerprint() -> str:
    """Hash of the C code, which every library holds: in a checkout it may be older than that."""
    return hashlib.sha256("\0".join(sources().values()).encode()).hexdigest()[:20]


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    """A compiler's run, with what it says.

    Raises:
        subprocess.TimeoutExpired: It did not end.
    """
    return subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=SECONDS, errors="replace"
    )


def compile_library(source: Path, flags: tuple[str, ...], target: Path) -> str | None:
    """Compile a library.

    Args:
        source: The file to compile.
        flags: Of the processor, and whatever else is asked for.
        target: Where the library is to be.

    Returns:
        Why that failed; None if all is well.
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
        output = (completed.stderr or completed.stdout).strip() or "it said nothing"
        return f"{name} failed with status {completed.returncode}: {output.splitlines()[0]}"
    return None


def compile_levels(folder: Path) -> tuple[list[Path], list[str]]:
    """Compile for every level of this machine.

    Args:
        folder: Of the libraries; it is made, and emptied first.

    Returns:
        The libraries, and what went wrong with others.
    """
    shutil.rmtree(folder, ignore_errors=True)
    kind = machine()
    works = [(level, MAIN, flags) for level, flags in levels(kind).items()]
    if not works:
        return [], [f"no code is written for {kind}"]
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
