"""Equations of `torch.einsum` that compute attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def equation(args: Sequence[Any]) -> tuple[tuple[str, str, str], Any, Any] | None:
    """An equation of two operands.

    Args:
        args: Positional arguments of `torch.einsum`.

    Returns:
        The index strings of both operands and of the result, and the two operands; None for other
        equations.
    """
    formula, *operands = args
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = list(operands[0])
    if not isinstance(formula, str) or len(operands) != 2 or "->" not in formula:
        return None
    inputs, out = formula.replace(" ", "").split("->")
    left, right = inputs.split(",")
    return (left, right, out), operands[0], operands[1]


def is_product(indices: tuple[str, str, str]) -> bool:
    """Whether an equation is a product of queries and keys, such as ``bic,bjc->bij``."""
    left, right, out = indices
    return is_average((left, right[:-2] + right[-2:][::-1], out))


def is_average(indices: tuple[str, str, str]) -> bool:
    """Whether an equation averages values by weights, such as ``bij,bjd->bid``."""
    left, right, out = indices
    batch, summed = left[:-2], left[-1:]
    rows = batch + left[-2:-1]
    long = min(len(left), len(right)) > 1
    return long and right[:-1] == batch + summed and out == rows + right[-1:]
