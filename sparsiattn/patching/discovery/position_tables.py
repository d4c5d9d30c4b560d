"""Finds the rows and columns of patches that a model computes in a dry run."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

_ATEN = torch.ops.aten


class PositionTables:
    """Collects tables of the rows and columns of patches, ``[tokens, 2 or 3]``, with values.

    Attributes:
        arguments: Those that a module takes.
        indices: Those that a table of embeddings or angles is indexed with.
    """

    def __init__(self) -> None:
        self.arguments: list[Tensor] = []
        self.indices: list[Tensor] = []

    def note_arguments(self, values: Iterable[Any]) -> None:
        """Look among the arguments of a module."""
        self.arguments += filter(_are_positions, values)

    def note_operator(self, func: Any, args: Any, out: Any) -> None:
        """Look among the indices of an operator that reads a table of floating-point numbers."""
        if isinstance(out, Tensor) and out.is_floating_point():
            self.indices += filter(_are_positions, _indices(func, args))

    def clear(self) -> None:
        """Forget all tables."""
        self.arguments.clear()
        self.indices.clear()


def _are_positions(value: Any) -> bool:
    if not isinstance(value, Tensor) or value.is_meta or value.dtype == torch.bool:
        return False
    if value.is_floating_point() or value.is_complex():
        return False
    return value.dim() == 2 and value.shape[1] in (2, 3)


def _indices(func: Any, args: Any) -> list[Tensor]:
    """The indices of a lookup ``table[positions]`` or ``table[rows, columns]``."""
    if func is _ATEN.embedding.default:
        return [args[1]]
    if func is not _ATEN.index.Tensor:
        return []
    indices = [index for index in args[1] if index is not None]
    kinds = {(index.shape, index.dtype, index.device) for index in indices}
    is_pair = len(indices) > 1 and len(kinds) == 1 and indices[0].dim() == 1
    return [torch.stack(indices, dim=-1)] if is_pair else indices
