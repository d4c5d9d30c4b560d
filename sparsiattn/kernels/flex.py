"""Key blocks through FlexAttention (arXiv 2412.05496), compiled once per shape.

The block lists of a pattern become a `BlockMask` unchanged. Prefix and summary keys go to extra
blocks at the end, as in `sparsiattn.kernels.gather`; unused slots of these and of the last block of
each list are masked.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from sparsiattn.attention.inputs import AttentionInputs
from sparsiattn.attention.key_lists import KeyBlocks
from sparsiattn.attention.pattern import Pattern
from sparsiattn.kernels import flex_compile
from sparsiattn.kernels.base import Kernel
from sparsiattn.kernels.cost import CallShape
from sparsiattn.kernels.derivatives import transform_refusals, twice_differentiable
from sparsiattn.kernels.flex_compile import FlexOperands, ProgramKey
from sparsiattn.kernels.gather import dense_rows, needs_grad, summary_rows
from sparsiattn.kernels.gpu_prices import OPERATOR_CALLS
from sparsiattn.kernels.padding import list_count, slot_macs, summary_count, tile_size
from sparsiattn.kernels.prices import Work

FLEX_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SMALLEST = 16
"""Smallest side of a matrix product on a GPU."""
FILLED_STEP = 64
"""Number of keys of a step that is assumed to fill tensor cores; smaller steps take as long."""
PACKING_CALLS = 30.0
"""Launches besides the compiled program: packing of operands and lists, unpacking of the result."""
PACKED_WORTH = 4
"""Bytes read and written in memory for a packed byte, at the price of bytes from the cache."""
LARGEST_STEP = 128
"""Largest number of queries or keys of a step of torch's kernels on a GPU."""


class Flex(Kernel):
    """Key blocks through compiled FlexAttention; new lists of the same shape do not recompile.

    CUDA forward and backward, CPU forward only. The first call of a shape compiles for about half
    a minute, so ``auto`` takes this kernel only for shapes that `Patch.warmup` has compiled.
    """

    name = "flex"
    summary = "key blocks through compiled FlexAttention (after warmup; on the CPU no gradients)"

    def why_unavailable(self) -> list[str]:
        if torch.compiler.is_compiling() or torch.cuda.is_available():
            return []
        return flex_compile.cpu_refusals()

    def why_not(self, inputs: AttentionInputs, pattern: Pattern) -> list[str]:
        if torch.compiler.is_compiling():
            return ["compiles its own program, so it cannot be part of a compiled model"]
        reasons = []
        if not isinstance(pattern, KeyBlocks):
            reasons.append(f"needs key blocks, got a {type(pattern).__name__} pattern")
        elif pattern.tiles is None:
            reasons.append("needs query tiles, got a list for every single query (tile=1)")
        if inputs.bias is not None:
            reasons.append("does not support the model's mask")
        if inputs.dropout:
            reasons.append("does not support dropout")
        dtype = _dtype(inputs)
        if dtype not in FLEX_DTYPES:
            reasons.append(f"needs float32, bfloat16 or float16, got {dtype}")
        return reasons + transform_refusals() + _device_refusals(inputs, pattern)

    def not_ready(self, inputs: AttentionInputs, pattern: Pattern) -> list[str]:
        assert isinstance(pattern, KeyBlocks)
        if inputs.q.device.type != "meta" and flex_compile.is_compiled(
            program_key(inputs, pattern)
        ):
            return []
        return ["not compiled yet for this shape: call patch.warmup(images)"]

    def work(self, inputs: AttentionInputs, pattern: Pattern) -> Work:
        assert isinstance(pattern, KeyBlocks)
        call, lists = CallShape.of(inputs), list_count(pattern)
        if call.device.type != "cuda":
            return call.attending(pattern.pairs())
        size, shared = pattern.blocks.size, pattern.prefix + summary_count(pattern)
        steps = pattern.chosen.shape[-1] + -(-shared // size)
        slots, rows = steps * size, lists * tile_size(pattern)
        # queries, keys and values are packed: written, and read twice
        moved = call.rows_bytes(lists * slots + PACKED_WORTH * (call.queries + call.keys))
        work = call.attending(rows * slots, calls=PACKING_CALLS + OPERATOR_CALLS, moved=moved)
        return replace(work, macs=work.macs * max(1.0, FILLED_STEP / size))

    def uncounted_macs(self, inputs: AttentionInputs, pattern: Pattern) -> int:
        assert isinstance(pattern, KeyBlocks)
        size = pattern.blocks.size
        shared = -(-(pattern.prefix + summary_count(pattern)) // size)
        return slot_macs(inputs, pattern, (pattern.chosen.shape[-1] + shared) * size)

    def warmup(self, inputs: AttentionInputs, pattern: Pattern) -> None:
        out = self(inputs, pattern)
        if out.requires_grad:
            leaves = [x for x in (inputs.q, inputs.k, inputs.v) if x.requires_grad]
            torch.autograd.grad(out.sum(), leaves)

    def __call__(self, inputs: AttentionInputs, pattern: Pattern) -> Tensor:
        assert isinstance(pattern, KeyBlocks)
        tiles = pattern.tiles
        assert tiles is not None
        if not inputs.q.numel():  # an empty batch: nothing to compile
            return inputs.q.new_zeros(*inputs.q.shape[:-1], inputs.v.shape[-1])
        key = program_key(inputs, pattern)
        # a program is valid for one autocast and one gradient mode, and not for inference tensors:
        # programs always run in the same modes, and their operands are made in these modes, too
        with (
            torch.inference_mode(False),
            torch.set_grad_enabled(torch.is_grad_enabled() and key.grad),
            torch.autocast(inputs.q.device.type, enabled=False),
        ):
            rows = flex_compile.run(key, operands_of(inputs, pattern))
            patches = tiles.scatter(rows.unflatten(-2, (-1, tiles.size)))
        if pattern.dense_rows:
            first = dense_rows(inputs, pattern.dense_rows).to(patches)
            patches = torch.cat([first, patches], dim=-2)
        return twice_differentiable(self.name, patches, inputs, pattern)


def _dtype(inputs: AttentionInputs) -> torch.dtype:
    """The dtype in which torch's own attention would compute."""
    device = inputs.q.device.type
    if device in ("cpu", "cuda") and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return inputs.q.dtype


def _device_refusals(inputs: AttentionInputs, pattern: Pattern) -> list[str]:
    device = inputs.q.device.type
    if device == "cpu":
        gradient = ["has no backward pass on the CPU"] if needs_grad(inputs) else []
        return flex_compile.cpu_refusals() + gradient
    if device == "meta":  # a dry run: the device is known when the model runs
        return []
    if device != "cuda":
        return [f"needs CPU or CUDA tensors, got {device}"]
    reasons, dims = [], (inputs.q.shape[-1], inputs.v.shape[-1])
    if min(dims) < SMALLEST:
        reasons.append(f"needs head dims of at least {SMALLEST} on CUDA, got {dims}")
    if isinstance(pattern, KeyBlocks) and pattern.tiles is not None:
        for groups, size in (("tiles", pattern.tiles.size), ("blocks", pattern.blocks.size)):
            if size < SMALLEST or size & (size - 1):
                reasons.append(f"needs {groups} of 16, 32, 64, ... patches on CUDA, got {size}")
        reasons += _half_gradient_refusals(inputs, pattern.tiles.size, pattern.blocks.size)
    return reasons


def _half_gradient_refusals(inputs: AttentionInputs, tile: int, block: int) -> list[str]:
    """Why torch cannot compile the backward pass in half precision on CUDA.

    Before version 2.15, torch takes only block sizes of its own, up to 128, and ignores those of
    `flex_compile.kernel_options`. In float32 they are 16, which divides every tile.
    """
    if flex_compile.adapts_block_sizes() or not needs_grad(inputs):
        return []
    dtype, step = _dtype(inputs), LARGEST_STEP
    if dtype == torch.float32 or (tile % step == 0 and block % step == 0):
        return []
    return [
        f"gradients in {dtype} need torch 2.15, or tiles and blocks of a multiple of {step} "
        f"patches, got torch {torch.__version__}, tiles of {tile} and blocks of {block}"
    ]


def program_key(inputs: AttentionInputs, pattern: KeyBlocks) -> ProgramKey:
    """The key of everything that the compiled program depends on."""
    q, tiles, blocks, summary = inputs.q, pattern.tiles, pattern.blocks, pattern.summary
    assert tiles is not None
    grad = torch.is_grad_enabled()
    return ProgramKey(
        device=q.device,
        dtype=_dtype(inputs),
        shape=(*q.shape[:2], tiles.count, blocks.count, pattern.chosen.shape[-1]),
        dims=(q.shape[-1], inputs.v.shape[-1]),
        lists=tuple(pattern.chosen.shape[:2]),
        bias=None if summary is None else tuple(summary.bias.shape[:3]),
        tile=tiles.size,
        size=blocks.size,
        even=blocks.even,
        keys=pattern.keys - pattern.prefix,
        prefix=pattern.prefix,
        cells=summary_count(pattern),
        scale=inputs.scale,
        needs=tuple(grad and x.requires_grad for x in (q, inputs.k, inputs.v)),
    )


def operands_of(inputs: AttentionInputs, pattern: KeyBlocks) -> FlexOperands:
    """Tokens in the order of tiles and blocks, and the lists, as new contiguous tensors."""
    tiles, dtype = pattern.tiles, _dtype(inputs)
    assert tiles is not None
    q = tiles.gather(inputs.q[..., pattern.dense_rows :, :]).flatten(-3, -2)
    k, v = (_packed(x.to(dtype), pattern) for x in (inputs.k, inputs.v))
    chosen = pattern.chosen.to(torch.int32).contiguous()
    return FlexOperands(q.to(dtype), k, v, chosen, _limits(pattern), _summary_bias(pattern))


def _packed(x: Tensor, pattern: KeyBlocks) -> Tensor:
    """``[B, H, N, D]`` to ``[B, H, R, D]``: the blocks, then prefix and summary keys, then zeros.

    On a GPU, the number of rows is a multiple of 128, too: otherwise torch's kernel checks the end
    of the keys in every block.
    """
    blocks, summary, prefix = pattern.blocks, pattern.summary, pattern.prefix
    parts = [blocks.gather(x[..., prefix:, :]).flatten(-3, -2), x[..., :prefix, :]]
    if summary is not None:
        parts.append(summary.pool(x))
    rows = sum(part.shape[-2] for part in parts)
    step = blocks.size if x.is_cpu else math.lcm(blocks.size, LARGEST_STEP)
    parts.append(x.new_zeros(*x.shape[:2], -rows % step, x.shape[-1]))
    return torch.cat(parts, dim=-2)


def _limits(pattern: KeyBlocks) -> Tensor:
    """How many keys each tile uses of each block, ``[B|1, H|1, T, U]``.

    Blocks of unequal size are padded at their end, and the last block of a list is cut to fit the
    budget.
    """
    blocks, chosen = pattern.blocks, pattern.chosen
    lengths = (blocks.weight > 0).sum(1)[chosen]
    before = lengths.cumsum(-1) - lengths
    limits = (pattern.keys - pattern.prefix - before).clamp_min(0).minimum(lengths)
    none = limits.new_zeros(*chosen.shape[:-1], blocks.count)
    return none.scatter(-1, chosen, limits).to(torch.int32)


def _summary_bias(pattern: KeyBlocks) -> Tensor | None:
    """Logits of the summary, ``[B|1, H|1, T or T * t, G]``: a row per tile or per slot."""
    if pattern.summary is None:
        return None
    rows = summary_rows(pattern, pattern.summary).flatten(-3, -2)
    return rows.to(torch.float32, copy=True).contiguous()
