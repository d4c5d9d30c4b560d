"""Operators that torch's ONNX exporter lacks, written in ONNX's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """For ``torch.onnx.export(custom_translation_table=...)``."""
    from onnxscript import opset18 as op

    def sort_stable(
        self: Any, stable: bool | None = None, dim: int = -1, descending: bool = False
    ) -> Any:
        """TopK of all: of equal values it gives the one of lower index first, either way, which
        is what a stable sort does."""
        count = op.Shape(self, start=dim, end=dim + 1 or None)
        return op.TopK(self, count, axis=dim, largest=int(descending), sorted=1)

    return {torch.ops.aten.sort.stable: sort_stable}
