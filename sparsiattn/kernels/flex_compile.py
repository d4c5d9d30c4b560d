"""The programs that `flex` compiles, and their cache."""

from __future__ import annotations

import os
import shutil
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class FlexOperands(NamedTuple):
    """The operands of a compiled program.

    Attributes:
        q: Queries by tile, ``[B, H, T * t, D]``.
        k: Keys by block, then prefix and summary keys in blocks of their own, then unused blocks,
            ``[B, H, U * size, D]``.
        v: Their values, ``[B, H, U * size, Dv]``.
        chosen: Blocks of every tile, ``[B|1, H|1, T, C]``, int32.
        limit: Number of keys that each tile uses of each block of patches, 0 if it is not chosen,
            ``[B|1, H|1, T, U']``.
        bias: Logits of the summary keys, ``[B|1, H|1, T or T * t, G]``; None without a summary.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    chosen: Tensor
    limit: Tensor
    bias: Tensor | None


@dataclass(frozen=True)
class ProgramKey:
    """The cache key of a compiled program.

    Attributes:
        device: Device that it runs on.
        dtype: Dtype of q, k and v.
        shape: Batch, heads, tiles, blocks of patches, and blocks of each list.
        dims: Head dims of queries and of values.
        lists: Leading dimensions of the lists, ``(B|1, H|1)``.
        bias: Leading dimensions of the summary's logits, ``(B|1, H|1, rows)``; None without a
            summary.
        tile: Number of queries of a tile.
        size: Number of keys of a block.
        even: Whether all blocks hold ``size`` keys.
        keys: Number of keys of each list, prefix not counted.
        prefix: Number of leading keys, which are in every list.
        cells: Number of summary keys.
        scale: Factor of QK^T.
        needs: Which of q, k and v require a gradient.
    """

    device: torch.device
    dtype: torch.dtype
    shape: tuple[int, ...]
    dims: tuple[int, int]
    lists: tuple[int, ...]
    bias: tuple[int, ...] | None
    tile: int
    size: int
    even: bool
    keys: int
    prefix: int
    cells: int
    scale: float
    needs: tuple[bool, ...]

    @property
    def grad(self) -> bool:
        """Whether any operand requires a gradient."""
        return any(self.needs)


_PROGRAMS: dict[ProgramKey, tuple[Callable[..., Tensor], Any]] = {}
"""Compiled functions, each with its code object."""
_LOCK = threading.Lock()


def run(key: ProgramKey, operands: FlexOperands) -> Tensor:
    """Attention of all tiles, ``[B, H, T * t, Dv]``; compiles on the first call of a shape."""
    with _LOCK:
        if key not in _PROGRAMS:
            _PROGRAMS[key] = _program(key)
    return _PROGRAMS[key][0](*operands)


def is_compiled(key: ProgramKey) -> bool:
    """Whether a call needs no compilation; `torch.compiler.reset` discards compiled programs."""
    program = _PROGRAMS.get(key)
    if program is None:
        return False
    entries = torch._dynamo.eval_frame._debug_get_cache_entry_list(program[1])
    return len(entries) > 0


def _program(key: ProgramKey) -> tuple[Callable[..., Tensor], Any]:
    """The compiled function and its code object.

    Each program has its own code object, because torch counts compilations per code object and
    gives up after eight.
    """
    function: Any = attention(key)
    code = function.__code__.replace()
    copy = FunctionType(code, function.__globals__, function.__name__, None, function.__closure__)
    return torch.compile(copy, fullgraph=True, dynamic=False), code


def kernel_options(key: ProgramKey) -> dict[str, Any] | None:
    """Options of the GPU kernel; None on a CPU.

    With fewer than 128 queries, torch would take its kernel for decoding, which puts all queries
    into one block and so cannot have tiles. Before version 2.15, torch's default block sizes do
    not fit small tiles and blocks either.
    """
    if key.device.type != "cuda":
        return None
    options: dict[str, Any] = {"BACKEND": "TRITON"}
    if adapts_block_sizes():
        return options
    m, n = min(key.tile, 64), min(key.size, 64)
    backward = {f"bwd_BLOCK_{name}": min(m, n, 32) for name in ("M1", "N1", "M2", "N2")}
    return {**options, "fwd_BLOCK_M": m, "fwd_BLOCK_N": n, **backward}


def adapts_block_sizes() -> bool:
    """Whether torch adapts the block sizes of its GPU kernel to small tiles, as from 2.15 on."""
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    return version >= (2, 15)


def attention(key: ProgramKey) -> Callable[..., Tensor]:
    """The function to compile, which takes the fields of `FlexOperands` as arguments.

    Everything except tensors is a constant in it. Its mask alone defines the complete pattern,
    because only compiled FlexAttention uses the lists: with compilation disabled, the function is
    slow but correct.
    """
    # imported late: it brings torch's compiler stack
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    tile, size, scale, grad = key.tile, key.size, key.scale, key.grad
    prefix, cells = key.prefix, key.cells
    blocks, count = key.shape[3:]
    options: Any = kernel_options(key)
    extra_keys = prefix + cells
    extra_blocks = -(-extra_keys // size)
    first_extra = blocks * size
    # with even blocks, all but the last of a list are complete and need no mask
    full = count - 1 if key.even else 0
    rows = 1 if key.bias is None or key.bias[2] != key.shape[2] else tile

    def program(
        q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, limit: Tensor, bias: Tensor | None
    ) -> Tensor:
        def mask(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            b, h = b % limit.shape[0], h % limit.shape[1]
            inside = j % size < limit[b, h, i // tile, (j // size).clamp(max=blocks - 1)]
            return torch.where(j >= first_extra, j < first_extra + extra_keys, inside)

        def score(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            assert bias is not None
            cell = j - first_extra - prefix
            b, h = b % bias.shape[0], h % bias.shape[1]
            added = bias[b, h, i // rows, cell.clamp(0, cells - 1)]
            return s + torch.where(cell >= 0, added, 0.0)

        units = k.shape[-2] // size
        every = torch.arange(units, dtype=chosen.dtype, device=chosen.device)
        extra = every[blocks : blocks + extra_blocks]
        extra = extra.expand(*chosen.shape[:-1], extra_blocks)
        counts, ids = _columns(torch.cat([chosen[..., full:], extra], dim=-1), units)
        full_counts, full_ids = _columns(chosen[..., :full], units) if full else (None, None)
        block_mask = BlockMask.from_kv_blocks(
            counts,
            ids,
            full_counts,
            full_ids,
            (tile, size),
            mask,
            seq_lengths=(q.shape[-2], k.shape[-2]),
            compute_q_blocks=grad,
        )
        out: Tensor = flex_attention(
            q,
            k,
            v,
            score_mod=None if bias is None else score,
            block_mask=block_mask,
            scale=scale,
            kernel_options=options,
        )
        return out

    return program


def _columns(x: Tensor, units: int) -> tuple[Tensor, Tensor]:
    """Lists in the form of `BlockMask`: their lengths, and ids padded to the number of blocks."""
    return x.new_full(x.shape[:-1], x.shape[-1]), F.pad(x, (0, units - x.shape[-1]))


@cache
def cpu_refusals() -> list[str]:
    """Why torch cannot compile FlexAttention for this machine's processor."""
    reasons = []
    avx2 = torch.cpu._is_avx2_supported() and os.getenv("ATEN_CPU_CAPABILITY") != "default"
    if not avx2 or sys.platform == "darwin" or torch.xpu.is_available():
        reasons.append("torch compiles it for x86 processors with AVX2 only (not on macOS)")
    names = [os.environ.get("CXX", ""), "g++", "clang++", "c++", "cl"]
    if not any(name and shutil.which(name) for name in names):
        reasons.append("needs a C++ compiler to compile for the CPU")
    return reasons
