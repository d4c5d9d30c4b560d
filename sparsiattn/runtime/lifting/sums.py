"""Decomposed relative position biases, which are not materialised while a patch is active."""

from __future__ import annotations

from collections.abc import Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from sparsiattn.attention.derivatives import is_tracing
from sparsiattn.attention.factored_bias import FactoredBias, are_factors, plain, sum_of
from sparsiattn.kernels.native import factors
from sparsiattn.runtime.class_swap import Swapped, swap_class, swap_class_back
from sparsiattn.runtime.thread_state import SITE_CALLS

SUMS = ("add",)


def put_off_sum(args: Sequence[Any], kwargs: Any = None) -> FactoredBias | None:
    """A deferred sum, if compiled code can use its two operands directly; else None.

    Args:
        args: Positional arguments of the addition.
        kwargs: Its keyword arguments.
    """
    if not can_put_off(args, kwargs) or is_tracing() or not factors.serves(*args):
        return None
    return sum_of(*args)


def can_put_off(args: Sequence[Any], kwargs: Any) -> bool:
    """Whether these are the arguments of the addition that builds such a bias."""
    plain_sum = not kwargs and len(args) == 2 and all(type(x) is Tensor for x in args)
    return plain_sum and are_factors(*args)


class PutOffSums(TorchFunctionMode):
    """While active, sums of a bias per row of keys and a bias per column of keys are deferred."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__.strip("_") in SUMS:
            bias = put_off_sum(args, kwargs)
            if bias is not None:
                return bias
        return func(*args, **(kwargs or {}))


class Unsummed(Swapped):
    """Mixin of an attention module's class that builds no bias while a patch is active."""

    @staticmethod
    def members(host: Any) -> dict[str, Any]:
        return {"forward": _unsummed_forward(host)}


def _unsummed_forward(host: Any) -> Any:
    @wraps(host.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        top = SITE_CALLS.top
        if top is None or top[0] is None or torch.compiler.is_compiling():
            return host.forward(self, *args, **kwargs)
        with PutOffSums():
            output = host.forward(self, *args, **kwargs)
        return tree_map_only(FactoredBias, plain, output)

    return forward


def put_off_sums_of(module: Any) -> None:
    """Build no bias in a module while a patch is active."""
    swap_class(module, Unsummed)


def build_sums_of(module: Any) -> None:
    """Undo `put_off_sums_of`."""
    swap_class_back(module, Unsummed)
