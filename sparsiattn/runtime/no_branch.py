"""A zero that stands in for the MLP branch in the host's addition, at no cost.

A hook adds the MLP branch of a block that carries fewer tokens, and the result of the host's own
addition is not used. To save its time, adding this zero returns the other operand unchanged.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from sparsiattn.attention.derivatives import is_unobserved

_ADDS = frozenset(
    {torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__iadd__, Tensor.__radd__}
)


class NoBranch(Tensor):
    """A zero with one element; operations other than addition get a plain zero instead."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _ADDS and not kwargs and len(args) == 2:
            others = [x for x in args if type(x) is not cls]
            if len(others) == 1 and isinstance(others[0], Tensor):
                return others[0]
        with torch._C.DisableTorchFunctionSubclass():
            return func(
                *(_plain(x) for x in args), **{k: _plain(x) for k, x in (kwargs or {}).items()}
            )


def _plain(x: Any) -> Any:
    return torch.zeros_like(x).as_subclass(Tensor) if type(x) is NoBranch else x


@lru_cache(maxsize=64)
def _zero(dims: int, dtype: torch.dtype, device: torch.device) -> NoBranch:
    with torch.inference_mode(False):
        return torch.zeros((1,) * dims, dtype=dtype, device=device).as_subclass(NoBranch)


def no_branch(output: Tensor) -> Tensor:
    """A stand-in for the output of an MLP branch, which broadcasts to any shape it is added to."""
    if torch.is_grad_enabled() or output.requires_grad or not is_unobserved(output, output):
        return output.new_zeros((1,) * output.dim())
    return _zero(output.dim(), output.dtype, output.device)
