"""Compiles plan.c, and what it includes, for this processor; keeps the library in the user's cache.

The file's name holds a hash of source, compiler, flags and processor, so a file of that name fits.
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
import struct
import subprocess
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path

from sparsiattn.kernels import tuning_cache
from sparsiattn.kernels.atomic_io import replace_file
from sparsiattn.kernels.compiled import set_loaded

FLAGS = ("-O3", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
COMPILERS = ("cc", "gcc", "clang")
# ample for `cc` with a cold disk; a compiler that hangs must not hang the caller
SECONDS = 120

SOURCES = (
    "plan.c", "lists.c", "rows.c", "top.c", "merge.c", "biased.c", "attention.c", "chunks.c",
    "vectors.h",
)  # fmt: skip

# The layouts of `Call` in chunks.c, `Plan` in plan.c, `Top` in top.c, `Rows` in rows.c, `Merge` in
# merge.c, `KeyBiased` in biased.c, and of `Best` and `Votes` in lists.c.
ATTEND_CALL = struct.Struct("@32q12Pd")
SCORE_CALL = struct.Struct("@20q14P3dq")
TOP_CALL = struct.Struct("@4q3P")
ROWS_CALL = struct.Struct("@27q7P2d")
BEST_CALL = struct.Struct("@7q4Pd")
VOTES_CALL = struct.Struct("@20q7P2d")
MERGE_CALL = struct.Struct("@17q10P")
BIASED_CALL = struct.Struct("@18q6Pd")

CALLS = (
    ATTEND_CALL, SCORE_CALL, TOP_CALL, ROWS_CALL, BEST_CALL, VOTES_CALL, MERGE_CALL, BIASED_CALL,
)  # fmt: skip


@dataclass(frozen=True)
class Code:
    """The compiled functions; each takes a packed call.

    Attributes:
        attend: Attention, packed as `ATTEND_CALL`.
        score: Scores of key blocks, packed as `SCORE_CALL`.
        top: Places of the best scores, packed as `TOP_CALL`; returns 0 where memory ran out.
        rows: Attention of every query to its best keys, packed as `ROWS_CALL`.
        best: The best columns of every row, packed as `BEST_CALL`.
        votes: The keys that a tile's queries vote for, packed as `VOTES_CALL`.
        merge: Merged tokens, packed as `MERGE_CALL`.
        biased: Attention with a logit for every key, packed as `BIASED_CALL`.
    """

    attend: Callable[[bytes], None]
    score: Callable[[bytes], None]
    top: Callable[[bytes], int]
    rows: Callable[[bytes], None]
    best: Callable[[bytes], None]
    votes: Callable[[bytes], None]
    merge: Callable[[bytes], None]
    biased: Callable[[bytes], None]


@dataclass
class _State:
    """What this process knows of the compiled code.

    Attributes:
        code: The functions, once loaded.
        problem: Why compiling failed; None if it was not tried.
        searched_in: The environment in which `is_ready` last looked for a library.
    """

    code: Code | None = None
    problem: str | None = None
    searched_in: list[str | None] | None = None


_state = _State()
_LOCK = threading.Lock()


def compiler() -> list[str] | None:
    """The command of the C compiler: ``$CC``, else the first of cc, gcc and clang; None if there
    is none."""
    command = shlex.split(os.environ.get("CC", ""))
    if command:
        return command if shutil.which(command[0]) else None
    return next(([path] for name in COMPILERS if (path := shutil.which(name))), None)


def problem() -> str | None:
    """Why there can be no compiled code here; None if there is some, or may be."""
    if _state.code is not None or _state.problem is not None:
        return _state.problem
    if os.name != "posix":
        return f"is built on Linux and macOS only, not on {platform.system()}"
    if compiler() is None:
        name = os.environ.get("CC")
        if name:
            return f"$CC names the C compiler {name!r}, which is not there"
        return f"no C compiler was found ({', '.join(COMPILERS)} or $CC)"
    return None


def is_ready() -> bool:
    """Whether compiled code can be loaded without compiling."""
    if _state.code is not None:
        return True
    # every choice of a kernel asks this, so look for the file once per place only
    names = ("CC", "PATH", "SPARSIATTN_CACHE", "XDG_CACHE_HOME")
    environment = [os.environ.get(name) for name in names]
    if _state.searched_in == environment or problem() is not None:
        return False
    _state.searched_in = environment
    return folder().is_dir() and path().exists() and _load(path()) is None


def compile_here() -> str | None:
    """Compile what is missing and load it.

    Where the cache cannot be written, the library lives in a temporary folder as long as this
    process does.

    Returns:
        Why that failed; None if all is well.
    """
    with _LOCK:
        if _state.code is not None or problem() is not None:
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
    command = tuple(compiler() or ())
    return folder() / f"attention-{_identity(command)}.so"


def folder() -> Path:
    """The folder of compiled libraries, beside the tuning file."""
    return tuning_cache.path().parent / "native"


@cache
def sources() -> dict[str, str]:
    """The C code, by file name."""
    files = resources.files(__package__)
    return {name: files.joinpath(name).read_text(encoding="utf-8") for name in SOURCES}


@cache
def _identity(command: tuple[str, ...]) -> str:
    """Hash of all that the library depends on."""
    # virtual machines hide features of a processor, so its name alone does not identify it
    features = tuning_cache.cpuinfo("flags", "Features") or platform.machine()
    parts = (*sources().values(), *command, _version_of(command), *_flags())
    text = "\0".join((*parts, tuning_cache.processor(), features))
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def _flags() -> tuple[str, ...]:
    arm = platform.machine() in ("arm64", "aarch64")
    return *FLAGS, "-mcpu=native" if arm else "-march=native"


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=SECONDS, errors="replace"
    )


def _version_of(command: tuple[str, ...]) -> str:
    try:
        completed = _run([*command, "--version"])
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
    for name, text in sources().items():
        (build_folder / name).write_text(text, encoding="utf-8")
    new = build_folder / "attention.so"
    command = [
        *(compiler() or ()),
        *_flags(),
        str(build_folder / SOURCES[0]),
        "-o",
        str(new),
        "-lm",
    ]
    program = shlex.join(command[:1])
    try:
        completed = _run(command)
    except subprocess.TimeoutExpired:
        return f"{program} did not end within {SECONDS} s"
    if completed.returncode or not new.exists():
        output = (completed.stderr or completed.stdout).strip() or "it said nothing"
        return f"{program} failed with status {completed.returncode}: {output.splitlines()[0]}"
    if library is None:
        return _load(new)
    replace_file(new, library)
    return _load(library)


def _load(path: Path) -> str | None:
    """Load a library; why it cannot be used, None if it can."""
    expected = tuple(call.size for call in CALLS)
    try:
        library = ctypes.CDLL(str(path))
        names = ("attend", "score", "top", "rows", "best", "votes", "merge", "biased")
        functions = [getattr(library, f"sparsiattn_{name}") for name in names]
        names = ("call", "plan", "top", "rows", "best", "votes", "merge", "biased")
        sizes = tuple(getattr(library, f"sparsiattn_{name}_size")() for name in names)
    except (OSError, AttributeError) as error:
        return f"{path.name} cannot be loaded: {error}"
    if sizes != expected:
        return f"{path.name} takes calls of {sizes} bytes, not of {expected}"
    for function in functions:
        function.argtypes, function.restype = (ctypes.c_char_p,), None
    library.sparsiattn_top.restype = ctypes.c_int64
    set_loaded(True)
    _state.code = Code(*functions)
    return None
