"""ONNX translations of operators that torch's exporter does not support."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """The argument ``custom_translation_table`` of ``torch.onnx.export``."""
    from onnxscript import opset18 as op

    def sort_stable(
        self: Any, stable: bool | None = None, dim: int = -1, descending: bool = False
    ) -> Any:
        # among equal values TopK returns the lower index first, as a stable sort does
        count = op.Shape(self, start=dim, end=dim + 1 or None)
        return op.TopK(self, count, axis=dim, largest=int(descending), sorted=1)

    return {torch.ops.aten.sort.stable: sort_stable}
