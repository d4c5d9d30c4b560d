"""Keeps linear layers and attention whole in a dry run.

Without gradients, too, torch takes composite operators apart on their way to a dispatch mode: a
linear layer into four, attention into fifteen. They are two thirds of the operators of a
transformer's block, and every operator costs time in Python. Below autograd they arrive whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsiattn.attention.layout import HostCall
from sparsiattn.runtime.lifting import Trial


class WholeLinearTrial(Trial):
    """A `Trial` in which linear layers stay whole."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.linear or not _are_plain(args):
            return super().__torch_function__(func, types, args, kwargs)
        with torch._C._AutoDispatchBelowAutograd():
            return func(*args, **(kwargs or {}))


def whole_attention(call: HostCall) -> Tensor:
    """The host's own attention.

    With values torch has fused operators for it. With grouped heads it repeats the keys, which
    pixel numbers follow only part by part.
    """
    if not call.q.is_meta or call.gqa or not _are_plain((call.q, call.k, call.v)):
        return call.dense()
    with torch._C._AutoDispatchBelowAutograd():
        return call.dense()


def _are_plain(operands: Sequence[Any]) -> bool:
    """Whether no operand is a subclass, which may know only the parts of an operator."""
    return all(type(x) in _PLAIN for x in operands)


_PLAIN = (Tensor, nn.Parameter, type(None))
