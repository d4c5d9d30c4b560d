"""Compiles plan.c, and what it includes, for this processor; keeps the library in the user's cache.

The file's name carries a hash of source, compiler, flags and processor, so one that is found fits.
Nothing is compiled by `sparsiattn.patch` or in a forward pass: only `compile_here` does, which
`Patch.warmup` and `tune` call.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path

from sparsiattn.kernels import tuning_cache as tuningfile
from sparsiattn.kernels.atomic_io import replace_file
from sparsiattn.kernels.native import launch

FLAGS = ("-O3", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
COMPILERS = ("cc", "gcc", "clang")
# of `cc` with a cold disk, with room; a compiler that hangs must not take the caller along
SECONDS = 120

SOURCES = ("plan.c", "top.c", "attention.c", "chunks.c", "vectors.h")


@dataclass(frozen=True)
class Code:
    """The compiled functions; each takes a packed call. top: whether it had the memory."""

    attend: Callable[[bytes], None]
    score: Callable[[bytes], None]
    top: Callable[[bytes], int]


@dataclass
class _State:
    """What this process has. problem: why compiling failed, None if it was not tried."""

    code: Code | None = None
    loaded: bool = False  # what a compiler may trace
    problem: str | None = None
    looked: object = None


_state = _State()
_LOCK = threading.Lock()


def is_loaded() -> bool:
    """Whether this process has compiled code; looks nowhere, so a compiler can trace it."""
    return _state.loaded


def compiler() -> list[str] | None:
    """The command of the C compiler: ``$CC``, else the first of cc, gcc and clang; None if there
    is none."""
    wanted = shlex.split(os.environ.get("CC", ""))
    if wanted:
        return wanted if shutil.which(wanted[0]) else None
    return next(([path] for name in COMPILERS if (path := shutil.which(name))), None)


def problem() -> str | None:
    """Why there can be no compiled code here; None if there is some, or may be."""
    if _state.code is not None or _state.problem is not None:
        return _state.problem
    if os.name != "posix":
        return f"is built on Linux and macOS only, not on {platform.system()}"
    if compiler() is None:
        named = os.environ.get("CC")
        if named:
            return f"$CC names the C compiler {named!r}, which is not there"
        return f"no C compiler was found ({', '.join(COMPILERS)} or $CC)"
    return None


def is_ready() -> bool:
    """Whether compiled code can be loaded without compiling."""
    if _state.code is not None:
        return True
    # looked for once per place: this is asked at every choice of a kernel
    now = [os.environ.get(name) for name in ("CC", "PATH", "SPARSIATTN_CACHE", "XDG_CACHE_HOME")]
    if _state.looked == now or problem() is not None:
        return False
    _state.looked = now
    return folder().is_dir() and path().exists() and _load(path()) is None


def compile_here() -> str | None:
    """Compiles what is missing and loads it; why that failed, None if all is well.

    Where the cache cannot be written, the library lives in a temporary folder as long as this
    process does.
    """
    with _LOCK:
        if _state.code is not None or problem() is not None:
            return problem()
        where = path()
        why = None if where.exists() and _load(where) is None else _compile(where)
        _state.problem = why
    return why


def code() -> Code:
    """The compiled function, which takes a packed call; compiled now if it was not before."""
    if _state.code is None and not is_ready():
        compile_here()
    if _state.code is None:
        raise RuntimeError(f"native attention has no compiled code: {problem()}")
    return _state.code


def forget() -> None:
    """Looks for compiler and library again when they are needed next."""
    with _LOCK:
        _state.code = _state.problem = _state.looked = None
        _state.loaded = False
        _identity.cache_clear()


def path() -> Path:
    """Where the library is kept, or would be."""
    command = tuple(compiler() or ())
    return folder() / f"attention-{_identity(command)}.so"


def folder() -> Path:
    return tuningfile.path().parent / "native"


@cache
def sources() -> dict[str, str]:
    """The C code, by file name."""
    files = resources.files(__package__)
    return {name: files.joinpath(name).read_text(encoding="utf-8") for name in SOURCES}


@cache
def _identity(command: tuple[str, ...]) -> str:
    told = _said([*command, "--version"])
    parts = (
        *sources().values(),
        *command,
        told,
        *FLAGS,
        *_tuned(),
        tuningfile.processor(),
        _features(),
    )
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]


def _features() -> str:
    """What the processor can do: virtual machines hide some of it under one name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((x for x in lines if x.startswith(("flags", "Features"))), platform.machine())


def _tuned() -> list[str]:
    return ["-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"]


def _said(command: list[str]) -> str:
    try:
        run = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=SECONDS, errors="replace"
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return run.stdout + run.stderr


def _compile(where: Path) -> str | None:
    try:
        where.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=where.parent, prefix=".build-") as own:
            return _compile_in(Path(own), where)
    except OSError:  # a cache that cannot be written costs the next process the same seconds
        with tempfile.TemporaryDirectory(prefix="sparsiattn-") as own:
            return _compile_in(Path(own), None)


def _compile_in(folder: Path, where: Path | None) -> str | None:
    """Compiles in a folder of this process's own and moves the library to its place at once, so
    that others see all of it or nothing. None if it works."""
    for name, text in sources().items():
        (folder / name).write_text(text, encoding="utf-8")
    written, made = folder / SOURCES[0], folder / "attention.so"
    command = [*(compiler() or ()), *FLAGS, *_tuned(), str(written), "-o", str(made), "-lm"]
    try:
        run = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=SECONDS, errors="replace"
        )
    except subprocess.TimeoutExpired:
        return f"{shlex.join(command[:1])} did not end within {SECONDS} s"
    if run.returncode or not made.exists():
        said = (run.stderr or run.stdout).strip().splitlines() or ["it said nothing"]
        return f"{shlex.join(command[:1])} failed with status {run.returncode}: {said[0]}"
    if where is not None:
        replace_file(made, where)
    return _load(made if where is None else where)


def _load(where: Path) -> str | None:
    """Loads a library; why it cannot be used, None if it can."""
    try:
        library = ctypes.CDLL(str(where))
        attend, score, top = (
            getattr(library, f"sparsiattn_{x}") for x in ("attend", "score", "top")
        )
        told = tuple(getattr(library, f"sparsiattn_{x}_size")() for x in ("call", "plan", "top"))
    except (OSError, AttributeError) as error:
        return f"{where.name} cannot be loaded: {error}"
    if told != launch.sizes():
        return f"{where.name} takes calls of {told} bytes, not of {launch.sizes()}"
    attend.restype = score.restype = None
    top.restype = ctypes.c_int64
    for one in (attend, score, top):
        one.argtypes = (ctypes.c_char_p,)
    _state.loaded = True
    _state.code = Code(attend, score, top)
    return None
