"""Runs the library's work in torch's own threads, so that no second pool competes with them."""

from __future__ import annotations

import ctypes
import os
from functools import cache
from pathlib import Path
from typing import Any

import torch


def parallel_of(library: Any) -> int:
    """Let a library use torch's threads.

    Args:
        library: The library, loaded by ctypes.

    Returns:
        Address of the function that runs a region in these threads; 0 if there is none, and calls
        then run in one thread.
    """
    function = _torch_parallel_for()
    if function is None:
        return _openmp()
    library.sparsiattn_set_parallel_for.argtypes = (ctypes.c_void_p,)
    library.sparsiattn_set_parallel_for(ctypes.cast(function, ctypes.c_void_p))
    return _address(library.sparsiattn_parallel)


def _address(function: Any) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value or 0


@cache
def _torch_parallel_for() -> Any:
    """`torch_parallel_for` of torch's stable C interface; None if torch does not have it."""
    folder = Path(torch.__file__).parent / "lib"
    # except on Windows, symbols are also found in the libraries that a library links to
    path = folder / "torch_cpu.dll" if os.name == "nt" else torch._C.__file__
    try:
        return ctypes.CDLL(str(path)).torch_parallel_for
    except (OSError, AttributeError):
        return None


@cache
def _openmp() -> int:
    """Address of the function that runs a region in torch's own OpenMP; 0 if there is none."""
    torch_folder = Path(torch.__file__).parent
    inside = torch_folder.glob("lib/lib*omp*.so*")
    beside = torch_folder.parent.glob("torch.libs/lib*omp*")
    for path in sorted((*inside, *beside)):
        try:
            return _address(ctypes.CDLL(str(path)).GOMP_parallel)
        except (OSError, AttributeError):  # another library, or another OpenMP interface
            continue
    return 0
