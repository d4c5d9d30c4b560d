"""Finds compiled code, and compiles it for this processor where that is asked for.

Code comes from the package (`shipped`), else from the user's cache, where `compile_here` puts what
it compiles. A file's name there holds a hash of source, compiler, flags and processor, so a file of
that name fits. Nothing is compiled by `sparsiattn.patch` or in a forward pass: only `compile_here`
does, which `Patch.warmup` and `tune` call.
"""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import tempfile
import threading
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from sparsiattn.errors import InvalidOption
from sparsiattn.kernels import tuning_cache
from sparsiattn.kernels.atomic_io import replace_file
from sparsiattn.kernels.compiled import set_loaded
from sparsiattn.kernels.native import shipped, toolchain
from sparsiattn.kernels.native.entries import Code, open_library


@dataclass
class _State:
    """What this process knows of compiled code.

    Attributes:
        code: The functions, once loaded.
        source: Where they are from.
        problem: Why compiling failed; None if it was not tried.
        faults: What is wrong with libraries of the package.
        searched_in: The environment in which `is_ready` last looked for a library.
    """

    code: Code | None = None
    source: str = ""
    problem: str | None = None
    faults: tuple[str, ...] = ()
    searched_in: list[str | None] | None = None


_state = _State()
_LOCK = threading.Lock()


def problem() -> str | None:
    """Why there can be no compiled code here; None if there is some, or may be."""
    try:
        if is_ready() or _state.problem is not None:
            return None if _state.code is not None else _state.problem
        asked = shipped.wanted()
    except InvalidOption as error:
        return str(error)
    if asked == "off":
        return f"is switched off by {shipped.VARIABLE}=off"
    if asked in shipped.LEVELS:
        return "; ".join(_state.faults)
    return _why_not_compiled()


def _why_not_compiled() -> str | None:
    """Why nothing can be compiled here."""
    if os.name != "posix":
        return f"is compiled on Linux and macOS only, not on {platform.system()}"
    return toolchain.missing()


def faults() -> tuple[str, ...]:
    """What is wrong with libraries of the package that should have been taken, a line each."""
    try:
        is_ready()
    except InvalidOption as error:
        return (str(error),)
    return _state.faults


def source() -> str:
    """Where the code that was loaded is from, in words; empty where there is none."""
    return _state.source


def is_chosen() -> bool:
    """Whether the user said which code may run."""
    return bool(os.environ.get(shipped.VARIABLE))


def is_ready() -> bool:
    """Whether there is compiled code, or some can be loaded without compiling.

    Raises:
        InvalidOption: ``$SPARSIATTN_NATIVE`` has no such value.
    """
    if _state.code is not None:
        return True
    # every choice of a kernel asks this, so look for files once per place only
    names = (shipped.VARIABLE, "CC", "PATH", "SPARSIATTN_CACHE", "XDG_CACHE_HOME")
    environment = [os.environ.get(name) for name in names]
    if _state.searched_in == environment:
        return False
    found = shipped.find()
    _state.searched_in, _state.faults = environment, found.faults
    if found.code is not None:
        _take(found.code, f"shipped with the package, for {found.level}")
        return True
    if not _may_compile() or _why_not_compiled() is not None:
        return False
    return folder().is_dir() and path().exists() and _load(path()) is None


def _may_compile() -> bool:
    return shipped.wanted() in ("", "local")


def compile_here() -> str | None:
    """Load compiled code, compiled now if there was none.

    Where the cache cannot be written, the library lives in a temporary folder as long as this
    process does.

    Returns:
        Why that failed; None if all is well.
    """
    with _LOCK:
        if problem() is not None or _state.code is not None:
            return problem()
        library = path()
        loads = library.exists() and _load(library) is None
        _state.problem = None if loads else _compile(library)
        return _state.problem


def code() -> Code:
    """The compiled functions, compiled now if they were not before.

    Raises:
        RuntimeError: They cannot be compiled here.
    """
    if _state.code is None and not is_ready():
        compile_here()
    if _state.code is None:
        raise RuntimeError(f"native attention has no compiled code: {problem()}")
    return _state.code


def forget() -> None:
    """Look for compiler and library again when they are needed next."""
    with _LOCK:
        vars(_state).update(vars(_State()))
        set_loaded(False)
        _identity.cache_clear()


def path() -> Path:
    """Where the library is kept, or would be."""
    command = tuple(toolchain.compiler() or ())
    return folder() / f"attention-{_identity(command)}.so"


def folder() -> Path:
    """The folder of compiled libraries, beside the tuning file."""
    return tuning_cache.path().parent / "native"


@cache
def _identity(command: tuple[str, ...]) -> str:
    """Hash of all that the library depends on."""
    # virtual machines hide features of a processor, so its name alone does not identify it
    features = tuning_cache.cpuinfo("flags", "Features") or platform.machine()
    parts = (toolchain.fingerprint(), *command, _version_of(command), *toolchain.FLAGS, _flag())
    text = "\0".join((*parts, tuning_cache.processor(), features))
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def _flag() -> str:
    return "-mcpu=native" if toolchain.machine() == "arm" else "-march=native"


def _version_of(command: tuple[str, ...]) -> str:
    try:
        completed = toolchain.run([*command, "--version"])
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return completed.stdout + completed.stderr


def _compile(library: Path) -> str | None:
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent, prefix=".build-") as build_folder:
            return _compile_in(Path(build_folder), library)
    except OSError:  # a cache that cannot be written costs the next process the same seconds
        with tempfile.TemporaryDirectory(prefix="sparsiattn-") as build_folder:
            return _compile_in(Path(build_folder), None)


def _compile_in(build_folder: Path, library: Path | None) -> str | None:
    """Compile in a folder of this process's own and move the library to its place in one step, so
    that other processes see all of it or nothing; why that failed, or None."""
    new = build_folder / "attention.so"
    failure = toolchain.compile_library(toolchain.HERE / toolchain.MAIN, (_flag(),), new)
    if failure:
        return failure
    if library is None:
        return _load(new)
    replace_file(new, library)
    return _load(library)


def _load(path: Path) -> str | None:
    """Load a library that was compiled here; why it cannot be used, None if it can."""
    opened = open_library(path)
    if isinstance(opened, str):
        return opened
    _take(opened, "compiled on this machine")
    return None


def _take(code: Code, source: str) -> None:
    set_loaded(True)
    _state.code, _state.source = code, source
