"""Key lists on the CPU in compiled code: no copies of keys, one call per site."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsiattn.attention.background import CountedSummary, Summary
from sparsiattn.attention.inputs import AttentionInputs
from sparsiattn.attention.key_lists import KeyBlocks, KeyLists
from sparsiattn.attention.pattern import Pattern
from sparsiattn.kernels import cost
from sparsiattn.kernels.base import Kernel
from sparsiattn.kernels.cost import CallShape, Work
from sparsiattn.kernels.gather import needs_grad
from sparsiattn.kernels.native import build
from sparsiattn.kernels.native.ops import attention
from sparsiattn.kernels.native.scores import CELLS, held
from sparsiattn.kernels.padding import slot_macs, summary_count

WIDEST = 256
# queries of one vector, as attention.c counts them at most; tiles are padded to whole vectors
LANES, FEW = 16, 4
CALLS = 20.0
_NOT_COMPILED = "not compiled yet on this machine: run patch.warmup(images) once"


class Native(Kernel):
    """Key lists and key blocks by a C loop over query tiles under a running softmax
    (FlashAttention, arXiv 2205.14135): float32 inference on a CPU.

    It is compiled for the processor at hand by the system's C compiler, in some seconds, when
    `Patch.warmup`, `tune` or `compile_native` asks for it, and kept beside the tuning file.
    """

    name = "native"
    summary = "key lists on a CPU in compiled C (saves time and memory; no training)"

    def why_unavailable(self) -> list[str]:
        if torch.compiler.is_compiling():  # a traced program cannot look for files
            return [] if build.is_loaded() else [_NOT_COMPILED]
        found = build.problem()
        return [] if found is None else [found]

    def why_not(self, inputs: AttentionInputs, pattern: Pattern) -> list[str]:
        found = self.why_unavailable()
        if not isinstance(pattern, KeyLists):
            found.append(f"needs key lists, got a {type(pattern).__name__} pattern")
        return found + _unfit(inputs)

    def not_ready(self, inputs: AttentionInputs, pattern: Pattern) -> list[str]:
        if torch.compiler.is_compiling():
            return [] if build.is_loaded() else [_NOT_COMPILED]
        return [] if build.is_ready() else [_NOT_COMPILED]

    def warmup(self, inputs: AttentionInputs, pattern: Pattern) -> None:
        build.compile_here()

    def work(self, inputs: AttentionInputs, pattern: Pattern) -> Work:
        assert isinstance(pattern, KeyLists)
        call, tiles = CallShape.of(inputs), pattern.tiles
        rows = pattern.n_queries - pattern.dense_rows if tiles is None else tiles.count
        size = 1 if tiles is None else tiles.size
        keys = pattern.width + summary_count(pattern)
        pairs = rows * _padded(size) * keys + pattern.dense_rows * call.keys
        # every tile reads its rows from a cache that is not its thread's own
        return call.attending(pairs, calls=CALLS, moved=call.rows_bytes(rows * keys + call.keys))

    def uncounted_macs(self, inputs: AttentionInputs, pattern: Pattern) -> int:
        assert isinstance(pattern, KeyLists)
        size = 1 if pattern.tiles is None else pattern.tiles.size
        slots = pattern.width + summary_count(pattern)
        return slot_macs(inputs, pattern, slots, tile=_padded(size))

    def __call__(self, inputs: AttentionInputs, pattern: Pattern) -> Tensor:
        assert isinstance(pattern, KeyLists)
        blocks = pattern.blocks if isinstance(pattern, KeyBlocks) else None
        summary, tiles = pattern.summary, pattern.tiles
        return attention(
            inputs.q,
            inputs.k,
            inputs.v,
            pattern.chosen if isinstance(pattern, KeyBlocks) else pattern.index,
            None if blocks is None else blocks.order,
            None if blocks is None else held(blocks),
            None if tiles is None else tiles.order,
            None if summary is None else summary.cells,
            None if summary is None or _counts(summary) else summary.bias,
            summary_count(pattern),
            pattern.width,
            pattern.prefix if isinstance(pattern, KeyBlocks) else 0,
            pattern.dense_rows,
            inputs.scale,
        )


def _unfit(inputs: AttentionInputs) -> list[str]:
    """What is wrong with the operands."""
    found, q, k, v = [], inputs.q, inputs.k, inputs.v
    # a dry run on shapes alone says nothing of the device that the call will run on
    if q.device.type not in ("cpu", "meta") or inputs.device.type not in ("cpu", "meta"):
        found.append(f"needs CPU tensors, got {inputs.device.type}")
    if {q.dtype, k.dtype, v.dtype} != {torch.float32}:
        found.append(f"needs q, k and v of float32, got {q.dtype}, {k.dtype} and {v.dtype}")
    if max(q.shape[-1], v.shape[-1]) > WIDEST:
        found.append(f"needs head dims up to {WIDEST}, got {q.shape[-1]} and {v.shape[-1]}")
    if inputs.bias is not None:
        found.append("takes no mask or bias of the host")
    if inputs.dropout:
        found.append("has no dropout")
    if needs_grad(inputs):
        found.append("has no backward pass")
    return found


def _counts(summary: Summary) -> bool:
    """Whether the bias follows from the lists, so that the kernel makes it on its way."""
    return isinstance(summary, CountedSummary) and summary.counted and summary.count <= CELLS


def _padded(size: int) -> int:
    """Queries that are computed for a tile of this size."""
    return size if size <= FEW else -(-size // LANES) * LANES


def compile_native() -> str | None:
    """Compile the `native` kernel now, unless it was before; why that failed, or None.

    Live patches choose anew at their next forward pass.
    """
    why = build.compile_here()
    cost.reload()
    return why
