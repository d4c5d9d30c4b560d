"""Operators whose Triton kernels torch's compiler sees, as those of `torch.library.triton_op`.

An operator of `torch.library.custom_op` is opaque: a compiled model calls it through Python, and
AOTInductor cannot do without Python. Here the compiler takes the operator apart into torch's own
operations and launches, so that it writes the launches into its own code. `triton_op` would do the
same, but it imports triton, and torch's compiler, as soon as an operator is defined.

Operators stay opaque in exported programs (the compiler takes them apart later), where shapes are
symbolic, where kernels are interpreted, and outside of CUDA.

Torch finds out what a kernel writes from the addresses of its stores. Where these depend on a
tensor, a kernel reads it in its own body, because torch takes every tensor that is passed to a
function of triton for a part of the address that this function returns.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensorMode

_STATE = threading.local()


def show_kernels(operator: Any, implementation: Callable[..., Any]) -> None:
    """Let torch's compiler trace the implementation of an operator.

    Args:
        operator: What `torch.library.custom_op` returned.
        implementation: Its implementation; launches go through `Launch.run`.
    """

    def trace(mode: Any, op: Any, types: Any, args: Any, kwargs: Any) -> Any:
        if not _can_be_taken_apart(args):
            return mode.__torch_dispatch__(op, types, args, kwargs)
        with mode, _traced():
            return implementation(*args, **(kwargs or {}))

    operator.register_torch_dispatch(FunctionalTensorMode, trace)


def is_traced() -> bool:
    """Whether a launch is recorded for torch's compiler instead of run."""
    return getattr(_STATE, "traced", False)


@contextlib.contextmanager
def _traced() -> Iterator[None]:
    before = is_traced()
    _STATE.traced = True
    try:
        yield
    finally:
        _STATE.traced = before


def _can_be_taken_apart(args: Any) -> bool:
    tensors = [x for x in args if isinstance(x, Tensor)]
    if os.environ.get("TRITON_INTERPRET") == "1" or _keeps_operators():
        return False
    if any(x.device.type != "cuda" for x in tensors):
        return False
    # sizes of launches are computed from shapes, and would limit the program to some of them
    numbers = [n for x in tensors for n in (*x.shape, *x.stride())]
    return all(type(n) is int for n in (*numbers, *(x for x in args if not _is_operand(x))))


def _is_operand(x: Any) -> bool:
    """Whether an argument is no size."""
    return x is None or isinstance(x, (Tensor, float, bool))


def _keeps_operators() -> bool:
    """Whether `torch.export` is tracing, which stores operators by name."""
    try:
        from torch.export._trace import custom_triton_ops_decomposition_disabled
    except ImportError:
        return torch.compiler.is_exporting()
    return bool(custom_triton_ops_decomposition_disabled())
