"""The table of the library's functions and their structs, and loading of libraries.

A function is exported as `sparsiattn_NAME` and takes one struct; `sparsiattn_NAME_size` returns the
size of that struct in the library. To add a function, add a line to `ENTRIES` and a field to
`Code`.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from sparsiattn.kernels.native import threads, toolchain

# The layouts of `Call` in chunks.c, `Plan` in plan.c, `Top` in top.c, `Rows` in rows.c, `Merge` in
# merge.c, `KeyBiased` in biased.c, `Back` in backward.c, and of `Best` and `Votes` in lists.c.
ATTEND_CALL = struct.Struct("@38q13Pd")
SCORE_CALL = struct.Struct("@20q14P3dq")
TOP_CALL = struct.Struct("@4q3P")
ROWS_CALL = struct.Struct("@35q8P2d")
# parts of ROWS_CALL: between similar calls only the addresses differ
ROWS_HEAD, ROWS_ADDRESSES, ROWS_TAIL = map(struct.Struct, ("@35q", "@8P", "@2d"))
BEST_CALL = struct.Struct("@7q4Pd")
VOTES_CALL = struct.Struct("@27q8P2d")
# follows `ATTEND_CALL` in a call of backward.c
BACKWARD_REST = struct.Struct("@2q4P")
BACKWARD_CALL = struct.Struct("@38q13Pd2q4P")
MERGE_CALL = struct.Struct("@17q10P")
BIASED_CALL = struct.Struct("@18q6Pd")


class Entry(NamedTuple):
    """A function of the library.

    Attributes:
        call: Layout of its struct.
        result: ctypes type of its result; None for no result.
    """

    call: struct.Struct
    result: Any = None


ENTRIES = {
    "attend": Entry(ATTEND_CALL),
    "score": Entry(SCORE_CALL),
    "top": Entry(TOP_CALL, ctypes.c_int64),
    "rows": Entry(ROWS_CALL),
    "best": Entry(BEST_CALL),
    "votes": Entry(VOTES_CALL),
    "backward": Entry(BACKWARD_CALL),
    "merge": Entry(MERGE_CALL),
    "biased": Entry(BIASED_CALL),
}


@dataclass(frozen=True)
class Code:
    """The compiled functions; each takes a packed call.

    Attributes:
        parallel: Address of the function that runs a region in torch's threads; 0 if there is none.
        attend: Attention, packed as `ATTEND_CALL`.
        score: Scores of key blocks, packed as `SCORE_CALL`.
        top: Indices of the best scores, packed as `TOP_CALL`; returns 0 if memory ran out.
        rows: Attention of every query to its best keys, packed as `ROWS_CALL`.
        best: The best columns of every row, packed as `BEST_CALL`.
        votes: The keys that a tile's queries vote for, packed as `VOTES_CALL`.
        backward: Gradients of attention, packed as `ATTEND_CALL` and `BACKWARD_REST`.
        merge: Merging of tokens, packed as `MERGE_CALL`.
        biased: Attention with one bias per key, packed as `BIASED_CALL`.
    """

    parallel: int
    attend: Callable[[bytes], None]
    score: Callable[[bytes], None]
    top: Callable[[bytes], int]
    rows: Callable[[bytes], None]
    best: Callable[[bytes], None]
    votes: Callable[[bytes], None]
    backward: Callable[[bytes], None]
    merge: Callable[[bytes], None]
    biased: Callable[[bytes], None]


def load(path: Path) -> ctypes.CDLL:
    """Load a library.

    Raises:
        OSError: It cannot be loaded.
    """
    damage = _cut_short(path)
    if damage:
        raise OSError(damage)
    return ctypes.CDLL(str(path))


def open_library(path: Path) -> Code | str:
    """The functions of a library, or why it cannot be used."""
    try:
        library = load(path)
        functions = {name: getattr(library, f"sparsiattn_{name}") for name in ENTRIES}
        sizes = {name: getattr(library, f"sparsiattn_{name}_size")() for name in ENTRIES}
        library.sparsiattn_fingerprint.restype = ctypes.c_char_p
        fingerprint = library.sparsiattn_fingerprint().decode()
    except (OSError, AttributeError) as error:
        return f"{path.name} cannot be loaded: {error}"
    if fingerprint != toolchain.fingerprint():
        return f"{path.name} was compiled from other sources; install sparsiattn again"
    expected = {name: entry.call.size for name, entry in ENTRIES.items()}
    if sizes != expected:
        return f"{path.name} expects structs of {sizes} bytes, not of {expected}"
    for name, entry in ENTRIES.items():
        functions[name].argtypes, functions[name].restype = (ctypes.c_char_p,), entry.result
    return Code(threads.parallel_of(library), **functions)


_ELF = struct.Struct("<4sBB10x2xHIQQQIHHH")  # up to the number of program headers
_SEGMENT = struct.Struct("<IIQQQQQQ")


def _cut_short(path: Path) -> str | None:
    """Why an ELF library must not be loaded: reading past the end of a mapped file kills a process.

    The loaders of other systems check this themselves. Returns None if the file is complete.
    """
    content = path.read_bytes()
    if not content.startswith(b"\x7fELF"):
        return None if content else "the file is empty"
    if len(content) < _ELF.size:
        return "the file is cut short"
    if content[4] != 2:  # a 32-bit library: the loader refuses it
        return None
    *_, start, _, _, _, size, count = _ELF.unpack_from(content)
    if size != _SEGMENT.size or start + size * count > len(content):
        return "the file is cut short"
    for i in range(count):
        kind, _, offset, _, _, length, _, _ = _SEGMENT.unpack_from(content, start + i * size)
        if kind == 1 and offset + length > len(content):
            return "the file is cut short"
    return None
