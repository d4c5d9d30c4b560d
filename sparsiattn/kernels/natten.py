"""The kernel `natten`: exact neighbourhoods through the library of that name (arXiv 2504.16922).

It needs no lists: the library knows the window of every query from the shapes.
"""

from __future__ import annotations

import inspect
import math
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparsiattn.attention.geometry import Grid
from sparsiattn.attention.inputs import AttentionInputs
from sparsiattn.attention.key_lists import KeyIndex
from sparsiattn.attention.pattern import Pattern
from sparsiattn.kernels import optional
from sparsiattn.kernels.cost import CallShape
from sparsiattn.kernels.derivatives import transform_refusals, twice_differentiable
from sparsiattn.kernels.gather import needs_grad, with_dense_rows
from sparsiattn.kernels.padding import slot_macs
from sparsiattn.kernels.prices import Work

NATTEN_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CALLS = 15.0
"""Launches around the library's kernel: copies without prefix tokens, and rows of these."""
NEEDED = ("kernel_size", "stride", "scale", "additional_keys", "additional_values")
"""Arguments of the library's functions that this kernel passes, beside queries, keys and values."""


class Natten(optional.LibraryKernel):
    """The windows of ``local(window=...)``; prefix keys are the library's additional keys.

    Tiles are its stride. Differentiable.
    """

    name = "natten"
    summary = "windows of local(window=...) on a GPU (NATTEN)"

    def missing(self) -> str:
        return probe().reason

    def why_not(self, inputs: AttentionInputs, pattern: Pattern) -> list[str]:
        reasons = self.why_unavailable()
        if not isinstance(pattern, KeyIndex) or pattern.window is None:
            reasons.append(
                "needs the windows of local(window=...), got a "
                f"{type(pattern).__name__} pattern that is not known to be one"
            )
        else:
            reasons += _window_refusals(inputs, pattern, pattern.window)
        return reasons + _operand_refusals(inputs) + transform_refusals()

    def work(self, inputs: AttentionInputs, pattern: Pattern) -> Work:
        assert isinstance(pattern, KeyIndex)
        call = CallShape.of(inputs)
        pairs = (call.queries - pattern.dense_rows) * pattern.width
        pairs += pattern.dense_rows * call.keys
        return call.attending(pairs, calls=CALLS, moved=call.rows_bytes(3 * call.keys))

    def uncounted_macs(self, inputs: AttentionInputs, pattern: Pattern) -> int:
        assert isinstance(pattern, KeyIndex)
        return slot_macs(inputs, pattern, pattern.width)

    def __call__(self, inputs: AttentionInputs, pattern: Pattern) -> Tensor:
        assert isinstance(pattern, KeyIndex)
        assert pattern.window is not None
        if not inputs.q.numel():
            return inputs.q.new_zeros(*inputs.q.shape[:-1], inputs.v.shape[-1])
        grid, prefix = inputs.query_grid, inputs.prefix
        q, k, v = (
            x[..., prefix:, :].transpose(1, 2).unflatten(1, grid).contiguous()
            for x in (inputs.q, inputs.k, inputs.v)
        )
        options: dict[str, Any] = {"scale": inputs.scale}
        if pattern.width > math.prod(pattern.window):  # every list starts with the prefix keys
            options["additional_keys"], options["additional_values"] = (
                x[..., :prefix, :].transpose(1, 2).contiguous() for x in (inputs.k, inputs.v)
            )
        stride = _stride(pattern, grid)
        module = probe().module
        if grid[0] == 1:
            q, k, v = (x[:, 0] for x in (q, k, v))
            sizes = pattern.window[1:], stride[1:]
            rows = module.na1d(q, k, v, kernel_size=sizes[0], stride=sizes[1], **options)
        else:
            rows = module.na2d(q, k, v, kernel_size=pattern.window, stride=stride, **options)
            rows = rows.flatten(1, 2)
        out = with_dense_rows(rows.transpose(1, 2), inputs, pattern)
        return twice_differentiable(self.name, out, inputs, pattern)


def _stride(pattern: KeyIndex, grid: Grid) -> Grid:
    """Rows and columns of a tile; 1 and 1 without tiles."""
    if pattern.tiles is None:
        return 1, 1
    parts = pattern.tiles.parts
    return grid[0] // parts[0], grid[1] // parts[1]


def _window_refusals(inputs: AttentionInputs, pattern: KeyIndex, window: Grid) -> list[str]:
    reasons, grid = [], inputs.query_grid
    if pattern.tiles is not None and not pattern.tiles.even:
        reasons.append(f"needs tiles that divide the grid, got {inputs.tile} in {grid}")
    elif any(s > w for s, w in zip(_stride(pattern, grid), window, strict=True)):
        reasons.append(f"needs tiles no larger than the window {window}, got {inputs.tile}")
    if window[1] < 2 or (window[0] < 2 and grid[0] > 1):
        reasons.append(f"needs windows of at least 2 patches along each side, got {window}")
    if pattern.summary is not None:
        reasons.append("does not support background keys (background=None)")
    return reasons


def _operand_refusals(inputs: AttentionInputs) -> list[str]:
    q, k, v = inputs.q, inputs.k, inputs.v
    reasons, device, dims = [], q.device.type, (q.shape[-1], v.shape[-1])
    if device not in ("cuda", "meta"):
        reasons.append(f"needs CUDA tensors, got {device}")
    if q.dtype not in NATTEN_DTYPES or not q.dtype == k.dtype == v.dtype:
        types = sorted({str(x.dtype) for x in (q, k, v)})
        reasons.append(f"needs one of float32, bfloat16 and float16, got {', '.join(types)}")
    if any(dim % 8 for dim in dims):
        reasons.append(f"needs head dims of a multiple of 8, got {dims}")
    if inputs.bias is not None:
        reasons.append("does not support the model's mask")
    if inputs.dropout:
        reasons.append("does not support dropout")
    if not inputs.scale > 0:
        reasons.append(f"needs a positive scale, got {inputs.scale}")
    if needs_grad(inputs) and torch.are_deterministic_algorithms_enabled():
        reasons.append("has no deterministic gradients on every GPU, and torch is set to them")
    return reasons


class Library(NamedTuple):
    """The result of `probe`.

    Attributes:
        module: The library; None if it does not serve.
        reason: Why it does not serve; empty if it does.
    """

    module: Any
    reason: str


@cache
def probe() -> Library:
    """NATTEN with its compiled kernels, imported once, on first use."""
    module, reason = optional.load("natten")
    if module is None:
        return Library(None, reason)
    if not getattr(module, "HAS_LIBNATTEN", False):
        reason = "natten was installed without its compiled code (libnatten): it would compute "
        return Library(None, reason + "all logits; install a wheel for this torch and CUDA")
    for name in ("na1d", "na2d"):
        function = getattr(module, name, None)
        known = () if function is None else inspect.signature(function).parameters
        missing = [needed for needed in NEEDED if needed not in known]
        if missing:
            return Library(None, f"this natten's {name} lacks {', '.join(missing)}")
    return Library(module, "")
