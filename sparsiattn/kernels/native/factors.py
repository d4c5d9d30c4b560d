"""The host's bias as compiled code takes it: every entry, or its factors."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sparsiattn.attention.factored_bias import FactoredBias, plain
from sparsiattn.attention.inputs import AttentionInputs
from sparsiattn.kernels.native import scores

WIDEST = 256  # as in vectors.h


class HostBias(NamedTuple):
    """Arguments of the operators.

    Attributes:
        bias: ``[B|1, H|1, N|1, Nk]``, or its factors ``[B|1, H|1, N|1, kh + kw]``; None without.
        hard: Whether it forbids keys.
        across: Keys side by side, kw, where these are factors, else 0.
    """

    bias: Tensor | None
    hard: bool
    across: int


def serves(a: Tensor, b: Tensor) -> bool:
    """Whether compiled code may take the sum of these operands as its factors.

    Operands without data stand for such as it may take.
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
    """Rows and columns of keys, where compiled code takes the factors of a call's bias.

    They forbid no key, and there is no prefix, which has no place in a grid.
    """
    bias = inputs.bias
    if not isinstance(bias, FactoredBias) or not bias.merged or bias.origin.value is not None:
        return None
    fits = bias.dtype is torch.float32 and sum(bias.sides) <= WIDEST
    fits = fits and inputs.site.bias == "bias" and not inputs.prefix and not inputs.site.reordered
    return bias.sides if fits else None
