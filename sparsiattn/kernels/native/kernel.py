"""The kernel `native`: key lists on the CPU in compiled C, one call per site, no key copies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sparsiattn.attention.background import CountedSummary, Summary
from sparsiattn.attention.inputs import AttentionInputs
from sparsiattn.attention.key_lists import KeyBlocks, KeyLists
from sparsiattn.attention.pattern import Pattern
from sparsiattn.attention.top_logits import TopKeys
from sparsiattn.kernels import cost
from sparsiattn.kernels.base import Kernel
from sparsiattn.kernels.compiled import is_loaded
from sparsiattn.kernels.cost import CallShape
from sparsiattn.kernels.derivatives import transform_refusals, twice_differentiable
from sparsiattn.kernels.gather import needs_grad
from sparsiattn.kernels.native import build
from sparsiattn.kernels.native.factors import factor_sides, host_bias_of
from sparsiattn.kernels.native.gradients import differentiable_attention
from sparsiattn.kernels.native.ops import FLOATS, attention
from sparsiattn.kernels.native.rows import attend_to_best, repeat_best
from sparsiattn.kernels.native.scores import CELLS, group_sizes
from sparsiattn.kernels.padding import list_count, row_keys, slot_macs, summary_count, tile_size
from sparsiattn.kernels.prices import Work

WIDEST = 256  # as in vectors.h
# most queries in one vector; attention.c computes tiles larger than FEW in whole vectors
LANES, FEW = 16, 4
# cost of starting a call, in torch operations
CALLS = 20.0
# cost of finding the best keys of a query, in rows read and written
ROWS_WORTH = 6
# cost of reading and adding the host's bias of a pair, in softmax entries
BIAS_WORTH = 2
# cost of transposing a factor of the bias, in softmax entries
FACTORS_WORTH = 1
_NOT_COMPILED = "not compiled yet on this machine: run patch.warmup(images) once"


class Native(Kernel):
    """Key lists and key blocks by a C loop over query tiles with a running softmax.

    This is FlashAttention (arXiv 2205.14135) for CPUs. All arithmetic is in float32; operands may
    be in half precision, and the host may add a mask or a bias. The library comes with the package.
    If it is missing, `Patch.warmup`, `tune` and `compile_native` compile it for this processor with
    the system's C compiler, within seconds.
    """

    name = "native"
    summary = "key lists on a CPU in compiled C (saves time and memory)"

    def why_unavailable(self) -> list[str]:
        if torch.compiler.is_compiling():  # a traced program cannot search for files
            return [] if is_loaded() else [_NOT_COMPILED]
        problem = build.problem()
        return [] if problem is None else [problem]

    def why_not(self, inputs: AttentionInputs, pattern: Pattern) -> list[str]:
        reasons = self.why_unavailable()
        if not isinstance(pattern, KeyLists):
            reasons.append(f"needs key lists, got a {type(pattern).__name__} pattern")
        elif not isinstance(pattern, TopKeys) and pattern.summary is not None:
            reasons += _summary_refusals(pattern.summary)
        return reasons + _operand_refusals(inputs)

    def not_ready(self, inputs: AttentionInputs, pattern: Pattern) -> list[str]:
        compiling = torch.compiler.is_compiling()
        ready = is_loaded() if compiling else build.is_ready()
        return [] if ready else [_NOT_COMPILED]

    def warmup(self, inputs: AttentionInputs, pattern: Pattern) -> None:
        build.compile_here()

    def repeatable(
        self, inputs: AttentionInputs, pattern: Pattern
    ) -> Callable[[Tensor, Tensor, Tensor], Tensor] | None:
        # the values of a bias may change in the next call, and a gradient needs the lists
        if type(pattern) is not TopKeys or inputs.bias is not None or needs_grad(inputs):
            return None
        options = _best_options(inputs, pattern)[:-3]  # without the arguments of a bias
        return repeat_best(inputs.q, inputs.k, inputs.v, *options)

    def work(self, inputs: AttentionInputs, pattern: Pattern) -> Work:
        assert isinstance(pattern, KeyLists)
        if isinstance(pattern, TopKeys):
            return _best_work(inputs, pattern)
        call, lists, keys = CallShape.of(inputs), list_count(pattern), row_keys(pattern)
        pairs = lists * _padded(tile_size(pattern)) * keys + pattern.dense_rows * call.keys
        # every tile reads its rows from a cache that threads share
        moved = call.rows_bytes(lists * keys + call.keys)
        work = call.attending(pairs, calls=CALLS, moved=moved)
        return replace(work, logits=work.logits + _bias_logits(inputs))

    def uncounted_macs(self, inputs: AttentionInputs, pattern: Pattern) -> int:
        assert isinstance(pattern, KeyLists)
        if isinstance(pattern, TopKeys):
            return int(inputs.q.shape[:-2].numel() * _best_macs(inputs, pattern))
        tile = _padded(tile_size(pattern))
        return slot_macs(inputs, pattern, row_keys(pattern), tile=tile)

    def __call__(self, inputs: AttentionInputs, pattern: Pattern) -> Tensor:
        assert isinstance(pattern, KeyLists)
        if needs_grad(inputs):
            lists = pattern.listed() if isinstance(pattern, TopKeys) else pattern
            out = _attend_to_lists(inputs, lists, differentiable_attention)
            return twice_differentiable(self.name, out, inputs, lists)
        if isinstance(pattern, TopKeys):
            options = _best_options(inputs, pattern)
            return attend_to_best(inputs.q, inputs.k, inputs.v, *options)
        return _attend_to_lists(inputs, pattern, attention)


def _attend_to_lists(
    inputs: AttentionInputs, pattern: KeyLists, attend: Callable[..., Tensor]
) -> Tensor:
    summary, tiles = pattern.summary, pattern.tiles
    if isinstance(pattern, KeyBlocks):
        blocks, prefix = pattern.blocks, pattern.prefix
        lists = [pattern.chosen, blocks.order, group_sizes(blocks)]
    else:
        lists, prefix = [pattern.index, None, None], 0
    return attend(
        inputs.q,
        inputs.k,
        inputs.v,
        *lists,
        None if tiles is None else tiles.order,
        None if summary is None else summary.cells,
        None if summary is None or _kernel_counts(summary) else summary.bias,
        summary_count(pattern),
        pattern.width,
        prefix,
        pattern.dense_rows,
        inputs.scale,
        *host_bias_of(inputs),
    )


def _best_options(inputs: AttentionInputs, pattern: TopKeys) -> tuple[Any, ...]:
    """Arguments of `attend_to_best` after the operands."""
    summary, keep = pattern.summary, pattern.keys - pattern.prefix
    cells = None if summary is None else summary.cells
    host_bias = host_bias_of(inputs)
    count = summary_count(pattern)
    return cells, count, keep, pattern.prefix, pattern.dense_rows, inputs.scale, *host_bias


def _best_macs(inputs: AttentionInputs, pattern: TopKeys) -> int:
    """Multiply-accumulates of one head: all logits, and the values of listed keys."""
    cells, rows, dense = summary_count(pattern), inputs.n_queries, pattern.dense_rows
    columns, dim, width = inputs.n_keys + cells, inputs.q.shape[-1], inputs.v.shape[-1]
    listed = dense * inputs.n_keys + (rows - dense) * row_keys(pattern)
    pooled = inputs.n_keys * (dim + width) if cells else 0
    return rows * columns * dim + listed * width + pooled


def _best_work(inputs: AttentionInputs, pattern: TopKeys) -> Work:
    call = CallShape.of(inputs)
    heads = call.batch * call.heads
    scored = heads * call.queries * (call.keys + summary_count(pattern)) + _bias_logits(inputs)
    macs = heads * _best_macs(inputs, pattern)
    rows = heads * call.queries * ROWS_WORTH
    return Work(CALLS, macs, scored, call.rows_bytes(call.keys), rows)


def _bias_logits(inputs: AttentionInputs) -> float:
    """Cost of the host's bias, in softmax entries."""
    if inputs.bias is None:
        return 0.0
    call = CallShape.of(inputs)
    rows = call.batch * call.heads * call.queries
    sides = factor_sides(inputs)
    return BIAS_WORTH * rows * call.keys if sides is None else FACTORS_WORTH * rows * sum(sides)


def _summary_refusals(summary: Summary) -> list[str]:
    if summary.per_query:
        return ["the model's mask makes summary keys differ between queries"]
    if not _kernel_counts(summary) and torch.is_grad_enabled() and summary.bias.requires_grad:
        return ["does not support a gradient of the summary's bias"]
    return []


def _operand_refusals(inputs: AttentionInputs) -> list[str]:
    reasons, q, k, v = [], inputs.q, inputs.k, inputs.v
    # a dry run on meta tensors does not know the device that the call will run on
    if q.device.type not in ("cpu", "meta") or inputs.device.type not in ("cpu", "meta"):
        reasons.append(f"needs CPU tensors, got {inputs.device.type}")
    if q.dtype not in FLOATS or {k.dtype, v.dtype} != {q.dtype}:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOATS)
        got = f"{q.dtype}, {k.dtype} and {v.dtype}"
        reasons.append(f"needs q, k and v of the same dtype out of {names}, got {got}")
    if max(q.shape[-1], v.shape[-1]) > WIDEST:
        reasons.append(f"needs head dims up to {WIDEST}, got {q.shape[-1]} and {v.shape[-1]}")
    if inputs.dropout:
        reasons.append("does not support dropout")
    if needs_grad(inputs) and torch.compiler.is_compiling():
        reasons.append("has no backward pass in compiled programs")
    if torch.is_grad_enabled() and inputs.bias is not None and inputs.bias.requires_grad:
        reasons.append("does not support a gradient of the model's bias")
    return reasons + transform_refusals()


def _kernel_counts(summary: Summary) -> bool:
    """Whether the kernel counts the summary's bias itself, from the lists."""
    return isinstance(summary, CountedSummary) and summary.counted and summary.count <= CELLS


def _padded(size: int) -> int:
    """Number of queries that are computed for a tile of this size."""
    return size if size <= FEW else -(-size // LANES) * LANES


def compile_native() -> str | None:
    """Compile the `native` kernel now, unless its library exists.

    Active patches choose their kernels again in the next forward pass.

    Returns:
        Why that failed; None if it succeeded.
    """
    failure = build.compile_here()
    cost.reload()
    return failure
