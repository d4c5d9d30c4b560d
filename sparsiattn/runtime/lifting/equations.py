"""Equations of `torch.einsum` that spell attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def equation(args: Sequence[Any]) -> tuple[tuple[str, str, str], Any, Any] | None:
    """The three index lists of an equation of two operands, and these; None for others."""
    formula, *operands = args
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = list(operands[0])
    if not isinstance(formula, str) or len(operands) != 2 or "->" not in formula:
        return None
    inputs, out = formula.replace(" ", "").split("->")
    left, right = inputs.split(",")
    return (left, right, out), operands[0], operands[1]


def is_product(indices: tuple[str, str, str]) -> bool:
    """``bic,bjc->bij``: queries and keys in rows."""
    left, right, out = indices
    batch, rest = left[:-2], left[-2:]
    return right[:-2] == batch and right[-1] == rest[1] and out == batch + rest[0] + right[-2]


def is_average(indices: tuple[str, str, str]) -> bool:
    """``bij,bjd->bid``: weights and values in rows."""
    left, right, out = indices
    batch, rest = left[:-2], left[-2:]
    return right[:-2] == batch and right[-2] == rest[1] and out == batch + rest[0] + right[-1]
