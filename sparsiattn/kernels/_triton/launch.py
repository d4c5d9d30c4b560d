"""Launches of the Triton kernels: strides, tile sizes, order of arguments. Imports triton.

A launch is plain data (`Launch`), so that it can be compiled for a device that is not present.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsiattn.kernels._triton import kernels
from sparsiattn.kernels._triton.visible import is_traced

FEWEST = 16
"""The smallest side of a matrix product on tensor cores."""

GRADIENTS = ("q", "k", "v", "pooled_k", "pooled_v", "host", "rows")
"""Operands that have a gradient."""

TENSORS = (*GRADIENTS, "order", "weight", "chosen", "held", "table")
"""Operands that are tensors."""

AXES = {
    **dict.fromkeys(("q", "k", "v", "out", "grad", "to_q", "to_k", "to_v"), "bhn"),
    **dict.fromkeys(("host", "to_host"), "bhmn"),
    **dict.fromkeys(("rows", "to_rows"), "bhmg"),
    "chosen": "bht",
}
"""Names of the axes along which kernels step; all other tensors are contiguous."""


@dataclass(frozen=True, eq=False)
class KeyListOperands:
    """The operands of one call.

    Attributes:
        q: Queries ``[B, H, P + n, D]``.
        k: Keys ``[B, H, Nk, D]``.
        v: Values ``[B, H, Nk, Dv]``.
        pooled_k: Summary keys ``[B, H, G, D]``.
        pooled_v: Summary values ``[B, H, G, Dv]``.
        host: The host's mask, of 4 dimensions.
        rows: Logits of the summary, ``[B|1, H|1, T|n, G]``.
        order: Patch queries of every tile, ``[T, t]``; None if each query has its own list.
        weight: Zero for slots of tiles that repeat a query, ``[T, t]``; None if none does.
        chosen: Keys or blocks of every tile, ``[B|1, H|1, T, C]``.
        held: Number of keys in each of these blocks; None if all are the same.
        table: Keys of every block, ``[U, g]``; None for lists of single keys.
        first: Number of leading queries, which attend to every key and to no summary, P.
        prefix: Number of leading keys at the start of every list of blocks.
        keys: Number of positions in every list.
        scale: Factor of QK^T.
        lowest: The host's mask forbids at this logit and below; None if it never forbids.
    """

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
        """Number of queries of a tile."""
        return 1 if self.order is None else self.order.shape[1]

    @property
    def queries(self) -> int:
        """Number of queries, P + n."""
        return self.q.shape[-2]

    @property
    def width(self) -> int:
        """The larger head dim, padded."""
        return max(padded(self.q.shape[-1]), padded(self.v.shape[-1]))


@dataclass(frozen=True, eq=False)
class Launch:
    """One run of a kernel.

    Attributes:
        kernel: The triton function.
        programs: Number of programs.
        arguments: All of its arguments by name.
        warps: Number of warps of a program.
        stages: Number of stages of its software pipeline.
    """

    kernel: Any
    programs: int
    arguments: dict[str, Any]
    warps: int
    stages: int

    @property
    def options(self) -> dict[str, Any]:
        """Options of the compiler; the default of ``enable_fp_fusion`` differs by version."""
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}

    def run(self, device: torch.device) -> None:
        """Launch on the device of the operands; does nothing for an empty batch.

        While torch's compiler traces the operator, the launch becomes a part of its program.
        """
        if not self.programs:
            return
        if is_traced():
            self._record()
            return
        # triton launches on the current device, which need not be that of the operands
        on_cuda = device.type == "cuda"
        with torch.cuda.device(device) if on_cuda else contextlib.nullcontext():
            self.kernel[(self.programs,)](**self.arguments, **self.options)

    def _record(self) -> None:
        """Make the launch a part of the program that torch's compiler traces.

        `wrap_triton` takes no ``enable_fp_fusion`` (as of torch 2.15), so products and sums are
        fused in a compiled program if that is the default of the installed triton.
        """
        kernel = torch.library.wrap_triton(self.kernel)
        with warnings.catch_warnings():
            # triton's about that default; as an error, torch would take all operands for results
            warnings.simplefilter("ignore")
            kernel[(self.programs,)](**self.arguments, num_warps=self.warps, num_stages=self.stages)


@dataclass(frozen=True)
class Sizes:
    """How a program divides its work.

    Attributes:
        rows: Number of queries of a program.
        keys: Number of keys of a step.
        warps: Number of warps of a program.
        stages: Number of stages of the software pipeline.
    """

    rows: int
    keys: int
    warps: int
    stages: int


def forward_sizes(call: KeyListOperands) -> Sizes:
    """Sizes of a forward pass, chosen by shape only.

    They fit 99 KiB of shared memory and spill no registers in half precision. Autotuning while a
    model runs would make its results depend on timings.
    """
    row = call.width * call.q.element_size()
    if call.q.element_size() == 4:
        most, keys, stages = (64 if row <= 256 else 32), (32 if row <= 512 else 16), 2
    else:
        most, keys = (128 if row <= 256 else 64), (64 if row <= 256 else 32)
        stages = 3 if row <= 128 else 2 if row <= 256 else 1
    if call.host is not None:
        most, stages = min(most, 64), stages if row <= 256 else 1
    rows = _rows(call.slots, most)
    heavy = call.q.element_size() == 4 or call.host is not None or rows * call.width > 4096
    return Sizes(rows, keys, 8 if heavy else 4, stages)


def backward_sizes(call: KeyListOperands) -> Sizes:
    """As `forward_sizes`, for the backward pass, which holds twice as many operands at a time."""
    row = call.width * call.q.element_size()
    if call.q.element_size() == 4:
        most, keys, stages = (64 if row <= 256 else 32 if row <= 512 else 16), 16, 1
    else:
        most, keys = (64 if row <= 256 else 32), (64 if row <= 128 else 32)
        stages = 2 if row <= 128 else 1
    rows = _rows(call.slots, most)
    return Sizes(rows, keys, 8 if rows * call.width > 2048 else 4, stages)


def _rows(slots: int, most: int) -> int:
    """Number of queries of a program: a whole tile if it fits, else parts with few empty slots."""
    if slots <= most:
        return padded(slots)
    half = max(FEWEST, most // 2)
    return most if -(-slots // most) * most <= -(-slots // half) * half else half


def padded(size: int) -> int:
    """The power of two that a kernel computes with."""
    return max(FEWEST, 1 << (size - 1).bit_length())


def forward(call: KeyListOperands, out: Tensor, lse: Tensor) -> Launch:
    """The launch of a forward pass.

    Args:
        call: The operands.
        out: Receives the result, ``[B, H, P + n, Dv]``.
        lse: Receives the log-sum-exp of each row, ``[B, H, P + n]``.
    """
    return _launch(kernels.forward, call, forward_sizes(call), {"out": out, "lse": lse})


def backward(
    call: KeyListOperands, out: Tensor, lse: Tensor, grad: Tensor, into: Sequence[Tensor | None]
) -> Launch:
    """The launch of a backward pass.

    Args:
        call: The operands.
        out: The result of the forward pass.
        lse: The log-sum-exp of each row.
        grad: The gradient of ``out``.
        into: Gradients in the order of `GRADIENTS`. That of q is overwritten; the others are
            added to, those of keys and values only if they are there. That of the summary's
            logits has a row for every tile or for every patch query.
    """
    names = [f"to_{name}" for name in GRADIENTS]
    tensors = {"out": out, "lse": lse, "grad": grad, **dict(zip(names, into, strict=True))}
    launch = _launch(kernels.backward, call, backward_sizes(call), tensors)
    to_rows, tiles = into[-1], call.chosen.shape[-2]
    launch.arguments["TO_ROWS_BY_TILE"] = to_rows is not None and to_rows.shape[-2] == tiles
    return launch


def _launch(
    kernel: Any, call: KeyListOperands, sizes: Sizes, results: Mapping[str, Tensor | None]
) -> Launch:
    tensors = {**{name: getattr(call, name) for name in TENSORS}, **results}
    boolean = call.host is not None and call.host.dtype == torch.bool
    tensors["host"] = readable_mask(call.host)
    dim, value_dim, tiles = call.q.shape[-1], call.v.shape[-1], call.chosen.shape[-2]
    cells = 0 if call.pooled_k is None else call.pooled_k.shape[-2]
    pairs, parts = call.q.shape[0] * call.q.shape[1], -(-call.slots // sizes.rows)
    dense_parts = -(-call.first // sizes.rows)
    arguments = {
        **tensors,
        **{name: getattr(call, name) for name in ("slots", "queries", "first", "keys", "prefix")},
        "heads": call.q.shape[1],
        "tiles": tiles,
        "parts": parts,
        "dense_parts": dense_parts,
        "dense_programs": pairs * dense_parts,
        "all_keys": call.k.shape[-2],
        "cells": cells,
        "scale": call.scale,
        "DIM": dim,
        "VALUE_DIM": value_dim,
        "WIDE": padded(dim),
        "VALUE_WIDE": padded(value_dim),
        "ROWS": sizes.rows,
        "KEYS": sizes.keys,
        "CELLS": min(sizes.keys, padded(max(1, cells))),
        "UNIT": 0 if call.table is None else call.table.shape[1],
        "BY_TILE": call.rows is not None and call.rows.shape[-2] == tiles,
        "BOOLEAN": boolean,
        "LOWEST": call.lowest,
        "DENSE": call.first > 0,
    }
    for name, x in tensors.items():
        arguments.update(strides(name, x, AXES.get(name, "")))
    programs = pairs * (dense_parts + tiles * parts)
    return Launch(kernel, programs, arguments, sizes.warps, sizes.stages)


def strides(name: str, x: Tensor | None, axes: str) -> dict[str, int]:
    """Strides along the axes; 0 along an axis of size 1, which is broadcast."""
    names = [f"{name}_{axis}" for axis in axes]
    if x is None:
        return dict.fromkeys(names, 0)
    steps = (0 if n == 1 else step for n, step in zip(x.shape, x.stride(), strict=True))
    return dict(zip(names, steps, strict=False))


def readable_mask(x: Tensor | None) -> Tensor | None:
    """A mask as the kernels read it: triton has no pointers to booleans."""
    return x.view(torch.uint8) if x is not None and x.dtype == torch.bool else x
