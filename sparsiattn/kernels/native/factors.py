"""The host's bias in the form that compiled code takes: all entries, or its factors."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sparsiattn.attention.factored_bias import FactoredBias, plain
from sparsiattn.attention.inputs import AttentionInputs
from sparsiattn.kernels.native import scores

WIDEST = 256  # as in vectors.h


class HostBias(NamedTuple):
    """The host's bias as arguments of the operators.

    Attributes:
        bias: ``[B|1, H|1, N|1, Nk]``, or its factors ``[B|1, H|1, N|1, kh + kw]``; None if there is
            none.
        hard: Whether it forbids keys.
        across: Number of key columns, kw, if ``bias`` holds factors; else 0.
    """

    bias: Tensor | None
    hard: bool
    across: int


def serves(a: Tensor, b: Tensor) -> bool:
    """Whether compiled code can take the factors instead of the sum of these operands.

    Meta tensors stand for CPU tensors here.
    """
    fits = max(a.shape[-2:]) + max(b.shape[-2:]) <= WIDEST
    if not (a.is_meta and b.is_meta):
        return fits and scores.serves(a, b)
    return fits and a.dtype is torch.float32 and scores.is_ready()


def host_bias_of(inputs: AttentionInputs) -> HostBias:
    """The host's bias of a call."""
    bias, hard = inputs.bias, inputs.site.bias != "bias"
    if isinstance(bias, FactoredBias) and factor_sides(inputs) is not None:
        return HostBias(bias.factors(), False, bias.sides[1])
    return HostBias(plain(bias), hard, 0)


def factor_sides(inputs: AttentionInputs) -> tuple[int, int] | None:
    """Rows and columns of keys, if compiled code takes the factors of a call's bias; else None.

    Factors never forbid keys, and a prefix would have no position in the grid.
    """
    bias = inputs.bias
    if not isinstance(bias, FactoredBias) or not bias.merged or bias.origin.value is not None:
        return None
    fits = bias.dtype is torch.float32 and sum(bias.sides) <= WIDEST
    fits = fits and inputs.site.bias == "bias" and not inputs.prefix and not inputs.site.reordered
    return bias.sides if fits else None
