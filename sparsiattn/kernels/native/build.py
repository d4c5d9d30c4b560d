"""Finds compiled code, and compiles it for this processor on request.

Libraries come with the package (`shipped`), else from the user's cache, where `compile_here` saves
them. Names of files in the cache contain a hash of source, compiler, flags and processor, so a file
of the right name fits. `sparsiattn.patch` and forward passes never compile: only `compile_here`
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
    """The state of compiled code in this process.

    Attributes:
        code: The functions; None before they are loaded.
        source: Where they come from, in words.
        problem: Why compiling failed; None if it did not fail or was not tried.
        faults: Why libraries of the package could not be used.
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
    """Why compiled code cannot be used here; None if it is loaded or may be compiled."""
    try:
        if is_ready() or _state.problem is not None:
            return None if _state.code is not None else _state.problem
        asked = shipped.wanted()
    except InvalidOption as error:
        return str(error)
    if asked == "off":
        return f"is disabled by {shipped.VARIABLE}=off"
    if asked in shipped.LEVELS:
        return "; ".join(_state.faults)
    return _why_not_compiled()


def _why_not_compiled() -> str | None:
    """Why code cannot be compiled here; None if it can."""
    if os.name != "posix":
        return f"can be compiled on Linux and macOS only, not on {platform.system()}"
    return toolchain.missing()


def faults() -> tuple[str, ...]:
    """Why libraries of the package that should have been used were not, one line each."""
    try:
        is_ready()
    except InvalidOption as error:
        return (str(error),)
    return _state.faults


def source() -> str:
    """Where the loaded code comes from, in words; empty if none is loaded."""
    return _state.source


def is_chosen() -> bool:
    """Whether the user chose which code may run, by ``$SPARSIATTN_NATIVE``."""
    return bool(os.environ.get(shipped.VARIABLE))


def is_ready() -> bool:
    """Whether compiled code is loaded or can be loaded without compiling.

    Raises:
        InvalidOption: The value of ``$SPARSIATTN_NATIVE`` is unknown.
    """
    if _state.code is not None:
        return True
    # every choice of a kernel calls this, so search for files once per environment only
    names = (shipped.VARIABLE, "CC", "PATH", "SPARSIATTN_CACHE", "XDG_CACHE_HOME")
    environment = [os.environ.get(name) for name in names]
    if _state.searched_in == environment:
        return False
    library = shipped.find()
    _state.searched_in, _state.faults = environment, library.faults
    if library.code is not None:
        _take(library.code, f"shipped with the package, for {library.level}")
        return True
    if not _may_compile() or _why_not_compiled() is not None:
        return False
    return folder().is_dir() and path().exists() and _load(path()) is None


def _may_compile() -> bool:
    return shipped.wanted() in ("", "local")


def compile_here() -> str | None:
    """Load compiled code, and compile it first if there is none.

    If the cache cannot be written, the library is compiled in a temporary folder for this process
    only.

    Returns:
        Why that failed; None if it succeeded.
    """
    with _LOCK:
        if problem() is not None or _state.code is not None:
            return problem()
        library = path()
        loads = library.exists() and _load(library) is None
        _state.problem = None if loads else _compile(library)
        return _state.problem


def code() -> Code:
    """The compiled functions; compiles them if necessary.

    Raises:
        RuntimeError: They cannot be compiled here.
    """
    if _state.code is None and not is_ready():
        compile_here()
    if _state.code is None:
        raise RuntimeError(f"native attention has no compiled code: {problem()}")
    return _state.code


def forget() -> None:
    """Unload the code; the next use searches for library and compiler again."""
    with _LOCK:
        vars(_state).update(vars(_State()))
        set_loaded(False)
        _identity.cache_clear()


def path() -> Path:
    """Path of the library in the cache, whether or not it exists."""
    command = tuple(toolchain.compiler() or ())
    return folder() / f"attention-{_identity(command)}.so"


def folder() -> Path:
    """The folder of compiled libraries, next to the tuning file."""
    return tuning_cache.path().parent / "native"


@cache
def _identity(command: tuple[str, ...]) -> str:
    """Hash of everything that the library depends on."""
    # virtual machines may hide features of a processor, so its name does not identify it
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
    except OSError:  # the cache cannot be written: the next process has to compile again
        with tempfile.TemporaryDirectory(prefix="sparsiattn-") as build_folder:
            return _compile_in(Path(build_folder), None)


def _compile_in(build_folder: Path, library: Path | None) -> str | None:
    """Compile in a private folder and move the library to its place atomically.

    Other processes see the complete library or none. Returns why that failed, or None.
    """
    new = build_folder / "attention.so"
    failure = toolchain.compile_library(toolchain.HERE / toolchain.MAIN, (_flag(),), new)
    if failure:
        return failure
    if library is None:
        return _load(new)
    replace_file(new, library)
    return _load(library)


def _load(path: Path) -> str | None:
    """Load a library that was compiled here. Returns why it cannot be used, or None."""
    opened = open_library(path)
    if isinstance(opened, str):
        return opened
    _take(opened, "compiled on this machine")
    return None


def _take(code: Code, source: str) -> None:
    set_loaded(True)
    _state.code, _state.source = code, source
