"""What `flex` compiles, and the shelf on which compiled programs are kept."""

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


class Operands(NamedTuple):
    """q: ``[B, H, T * t, D]``. k, v: ``[B, H, U * size, D]`` and ``[..., Dv]``, the last blocks of
    prefix and summary keys included. chosen: ``[B|1, H|1, T, C]``, int32. limit: keys that each
    block gives, none if it was not chosen, ``[B|1, H|1, T, U']``. bias: of the summary keys,
    ``[B|1, H|1, T or T * t, G]``."""

    q: Tensor
    k: Tensor
    v: Tensor
    chosen: Tensor
    limit: Tensor
    bias: Tensor | None


@dataclass(frozen=True)
class Static:
    """What a program is compiled for. shape: batch, heads, tiles, blocks, blocks of each list;
    lists, bias: leading axes of those tensors; keys: of each list, prefix apart; needs: which of q,
    k, v want a gradient."""

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
        return any(self.needs)


_PROGRAMS: dict[Static, tuple[Callable[..., Tensor], Any]] = {}
_LOCK = threading.Lock()


def run(static: Static, operands: Operands) -> Tensor:
    """Attention of all tiles, ``[B, H, T * t, Dv]``; compiles at the first call of a shape."""
    with _LOCK:
        if static not in _PROGRAMS:
            _PROGRAMS[static] = _program(static)
    return _PROGRAMS[static][0](*operands)


def is_compiled(static: Static) -> bool:
    """Whether a call would run at once: compiled, and not forgotten by `torch.compiler.reset`."""
    program = _PROGRAMS.get(static)
    if program is None:
        return False
    entries = torch._dynamo.eval_frame._debug_get_cache_entry_list(program[1])
    return len(entries) > 0


def _program(static: Static) -> tuple[Callable[..., Tensor], Any]:
    """A function of its own code object, because torch counts compilations per code object and
    gives up after eight."""
    made: Any = attention(static)
    own = made.__code__.replace()
    fresh = FunctionType(own, made.__globals__, made.__name__, None, made.__closure__)
    return torch.compile(fresh, fullgraph=True, dynamic=False), own


def kernel_options(static: Static) -> dict[str, Any] | None:
    """Sizes of a GPU kernel's own tiles where torch would choose some that divide no small block:
    only from 2.15 on does it make them fit."""
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if static.device.type != "cuda" or version >= (2, 15):
        return None
    m, n = min(static.tile, 64), min(static.size, 64)
    b = min(m, n, 32)
    backward = {f"bwd_BLOCK_{name}": b for name in ("M1", "N1", "M2", "N2")}
    return {"fwd_BLOCK_M": m, "fwd_BLOCK_N": n, **backward}


def attention(static: Static) -> Callable[..., Tensor]:
    """The function to compile. Everything but tensors is a constant in it.

    Its mask alone says the whole pattern, because only compiled FlexAttention heeds the lists:
    where compiling is switched off the function is slow but right.
    """
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    tile, size, even, scale, grad = static.tile, static.size, static.even, static.scale, static.grad
    blocks, count = static.shape[3:]
    options: Any = kernel_options(static)
    extra, prefix, cells = static.prefix + static.cells, static.prefix, static.cells
    more = -(-extra // size)
    base, units = blocks * size, blocks + more
    whole = count - 1 if even else 0
    rows = 1 if static.bias is None or static.bias[2] != static.shape[2] else tile

    def columns(x: Tensor) -> tuple[Tensor, Tensor]:
        """Lists as `BlockMask` wants them: their lengths, and ids filled up to all blocks."""
        return x.new_full(x.shape[:-1], x.shape[-1]), F.pad(x, (0, units - x.shape[-1]))

    def program(
        q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, limit: Tensor, bias: Tensor | None
    ) -> Tensor:
        def mask(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            b, h = b % limit.shape[0], h % limit.shape[1]
            inside = j % size < limit[b, h, i // tile, (j // size).clamp(max=blocks - 1)]
            return torch.where(j >= base, j < base + extra, inside)

        def score(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            assert bias is not None
            cell = j - base - prefix
            b, h = b % bias.shape[0], h % bias.shape[1]
            added = bias[b, h, i // rows, cell.clamp(0, cells - 1)]
            return s + torch.where(cell >= 0, added, 0.0)

        always = torch.arange(blocks, units, dtype=chosen.dtype, device=chosen.device)
        always = always.expand(*chosen.shape[:-1], more)
        some, some_ids = columns(torch.cat([chosen[..., whole:], always], dim=-1))
        all_, all_ids = columns(chosen[..., :whole]) if whole else (None, None)
        lists = BlockMask.from_kv_blocks(
            some, some_ids, all_, all_ids, (tile, size), mask,
            seq_lengths=(q.shape[-2], k.shape[-2]), compute_q_blocks=grad,
        )  # fmt: skip
        mod = None if bias is None else score
        out: Tensor = flex_attention(
            q, k, v, score_mod=mod, block_mask=lists, scale=scale, kernel_options=options
        )
        return out

    return program


@cache
def cpu_refusals() -> list[str]:
    """Why torch cannot compile FlexAttention for this machine's processor."""
    found = []
    avx2 = torch.cpu._is_avx2_supported() and os.getenv("ATEN_CPU_CAPABILITY") != "default"
    if not avx2 or sys.platform == "darwin" or torch.xpu.is_available():
        found.append("torch compiles it for x86 processors with AVX2 only (not on macOS)")
    names = [os.environ.get("CXX", ""), "g++", "clang++", "c++", "cl"]
    if not any(name and shutil.which(name) for name in names):
        found.append("needs a C++ compiler to compile for the CPU")
    return found
