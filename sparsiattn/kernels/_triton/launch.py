"""How the Triton kernels are called: strides, tile sizes, the order of arguments. Imports triton.

A launch is made up as data first (`Launch`), so that it can be compiled for a device that is not
there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsiattn.kernels._triton.backward import backward as backward_kernel
from sparsiattn.kernels._triton.forward import forward as forward_kernel

FEWEST = 16
"""The smallest side of a matrix product on tensor cores."""


@dataclass(frozen=True, eq=False)
class Call:
    """The operands of one call. q: ``[B, H, P + n, D]``; k, v: ``[B, H, Nk, D|Dv]``; pooled_k,
    pooled_v: ``[B, H, G, D|Dv]``; host: the host's mask, of 4 dimensions; rows: the summary's
    logits, ``[B|1, H|1, T|n, G]``; order, weight: the tiles, ``[T, t]``; chosen: keys or blocks of
    every tile, ``[B|1, H|1, T, C]``; held: keys in each of these blocks where their number
    differs; table: keys of every block, ``[U, g]``. keys: places in every list. prefix: leading
    keys that begin every list of blocks. first: leading queries left out, P. lowest: what the
    host's mask forbids; None where it only favours."""

    q: Tensor
    k: Tensor
    v: Tensor
    pooled_k: Tensor | None
    pooled_v: Tensor | None
    host: Tensor | None
    rows: Tensor | None
    order: Tensor | None
    weight: Tensor | None
    chosen: Tensor
    held: Tensor | None
    table: Tensor | None
    first: int
    prefix: int
    keys: int
    scale: float
    lowest: float | None

    @property
    def slots(self) -> int:
        return 1 if self.order is None else self.order.shape[1]

    @property
    def queries(self) -> int:
        return self.q.shape[-2] - self.first


@dataclass(frozen=True, eq=False)
class Launch:
    """A kernel, how many programs it takes, and all of its arguments by name."""

    kernel: Any
    programs: int
    arguments: dict[str, Any]
    warps: int
    stages: int

    @property
    def options(self) -> dict[str, Any]:
        """Of the compiler; what it does by default with sums of products differs by version."""
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}

    def run(self, device: torch.device) -> None:
        if not self.programs:
            return
        here = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
        with here:
            self.kernel[(self.programs,)](**self.arguments, **self.options)


@dataclass(frozen=True)
class Sizes:
    """Queries and keys of one step, warps, and stages of the software pipeline."""

    rows: int
    keys: int
    warps: int
    stages: int


def forward_sizes(call: Call) -> Sizes:
    """Fixed by shape alone, for 99 KiB of shared memory and without spilled registers in half
    precision: measuring while a model runs would make its results depend on the clock."""
    row = _width(call) * call.q.element_size()
    if call.q.element_size() == 4:
        most, keys, stages = (64 if row <= 256 else 32), (32 if row <= 512 else 16), 2
    else:
        most, keys = (128 if row <= 256 else 64), (64 if row <= 256 else 32)
        stages = 3 if row <= 128 else 2
    if call.host is not None:
        most, stages = min(most, 64), stages if row <= 256 else 1
    rows = _rows(call.slots, most)
    heavy = call.q.element_size() == 4 or call.host is not None or rows * _width(call) > 4096
    return Sizes(rows, keys, 8 if heavy else 4, stages)


def backward_sizes(call: Call) -> Sizes:
    """As `forward_sizes`; the backward pass holds twice as many operands at a time."""
    row = _width(call) * call.q.element_size()
    if call.q.element_size() == 4:
        most, keys, stages = (64 if row <= 256 else 32 if row <= 512 else 16), 16, 1
    else:
        most, keys = (64 if row <= 256 else 32), (64 if row <= 128 else 32)
        stages = 2 if row <= 128 else 1
    rows = _rows(call.slots, most)
    return Sizes(rows, keys, 8 if rows * _width(call) > 2048 else 4, stages)


def _rows(slots: int, most: int) -> int:
    """Queries of a program: a whole tile if it fits, else parts of which few slots stay empty."""
    if slots <= most:
        return padded(slots)
    half = max(FEWEST, most // 2)
    return most if -(-slots // most) * most <= -(-slots // half) * half else half


def padded(size: int) -> int:
    """The power of two that a kernel computes with."""
    return max(FEWEST, 1 << (size - 1).bit_length())


def forward(call: Call, out: Tensor, lse: Tensor) -> Launch:
    """Writes ``out [B, H, P + n, Dv]``, the first P rows left alone, and the logarithms of the
    softmax's sums ``[B, H, n]``."""
    arguments = {**_shared(call, forward_sizes, out, lse), **_strides("out", out, "bhn")}
    return _launch(forward_kernel, call, forward_sizes, arguments)


def backward(
    call: Call, out: Tensor, lse: Tensor, grad: Tensor, into: Sequence[Tensor | None]
) -> Launch:
    """Writes the gradient of q and adds to the others, in the order of `GRADIENTS`."""
    named = dict(zip(GRADIENTS, into, strict=True))
    arguments = {
        **_shared(call, backward_sizes, out, lse),
        "grad": grad,
        **{f"to_{name}": x for name, x in named.items()},
        **_strides("out", out, "bhn"),
        **_strides("grad", grad, "bhn"),
        **_strides("to_q", named["q"], "bhn"),
        **_strides("to_k", named["k"], "bhn"),
        **_strides("to_v", named["v"], "bhn"),
        **_strides("to_host", named["host"], "bhmn"),
        **_strides("to_rows", named["rows"], "bhmg"),
    }
    return _launch(backward_kernel, call, backward_sizes, arguments)


GRADIENTS = ("q", "k", "v", "pooled_k", "pooled_v", "host", "rows")
"""Operands that have a gradient."""


def _launch(kernel: Any, call: Call, sizes: Any, arguments: dict[str, Any]) -> Launch:
    size = sizes(call)
    programs = call.q.shape[0] * call.q.shape[1] * call.chosen.shape[-2] * arguments["parts"]
    return Launch(kernel, programs, arguments, size.warps, size.stages)


def _width(call: Call) -> int:
    """The larger head dim, padded."""
    return max(padded(call.q.shape[-1]), padded(call.v.shape[-1]))


def _shared(call: Call, sizes: Any, out: Tensor, lse: Tensor) -> dict[str, Any]:
    """Arguments that both kernels take."""
    size = sizes(call)
    dim, value_dim = call.q.shape[-1], call.v.shape[-1]
    cells = 0 if call.pooled_k is None else call.pooled_k.shape[-2]
    boolean = call.host is not None and call.host.dtype == torch.bool
    tiles = call.chosen.shape[-2]
    names = ("q", "k", "v", "pooled_k", "pooled_v", "rows", "order", "weight", "held", "table")
    return {
        **{name: getattr(call, name) for name in names},
        "out": out, "lse": lse, "chosen": call.chosen,
        "host": call.host.view(torch.uint8) if boolean and call.host is not None else call.host,
        **_strides("q", call.q, "bhn"), **_strides("k", call.k, "bhn"),
        **_strides("v", call.v, "bhn"), **_strides("host", call.host, "bhmn"),
        **_strides("rows", call.rows, "bhmg"), **_strides("list", call.chosen, "bht"),
        "heads": call.q.shape[1], "tiles": tiles, "parts": -(-call.slots // size.rows),
        "slots": call.slots, "queries": call.queries, "first": call.first, "keys": call.keys,
        "prefix": call.prefix, "cells": cells, "scale": call.scale,
        "DIM": dim, "VALUE_DIM": value_dim, "WIDE": padded(dim), "VALUE_WIDE": padded(value_dim),
        "ROWS": size.rows, "KEYS": size.keys, "CELLS": min(size.keys, padded(max(1, cells))),
        "UNIT": 0 if call.table is None else call.table.shape[1],
        "BY_TILE": call.rows is not None and call.rows.shape[-2] == tiles,
        "BOOLEAN": boolean, "LOWEST": call.lowest,
    }  # fmt: skip


def _strides(name: str, x: Tensor | None, axes: str) -> dict[str, int]:
    """Steps along the axes; none along one of size 1, which is shared by all."""
    if x is None:
        return {f"{name}_{axis}": 0 for axis in axes}
    steps = (0 if n == 1 else step for n, step in zip(x.shape, x.stride(), strict=True))
    return {f"{name}_{axis}": step for axis, step in zip(axes, steps, strict=False)}
