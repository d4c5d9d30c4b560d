"""The kernel `flash_attn_4`: key blocks through FlashAttention-4's block-sparse forward on Hopper.

Its tiles and blocks are runs of rows, so tokens are packed in the order of tiles and of blocks.
Only whole blocks go there: a list's last block, if it is cut, prefix keys and summary keys are a
second, small attention (`sparsiattn.kernels.extra_keys`).
"""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparsiattn.attention.geometry import Tiles
from sparsiattn.attention.inputs import AttentionInputs
from sparsiattn.attention.key_lists import KeyBlocks
from sparsiattn.attention.pattern import Pattern
from sparsiattn.kernels import extra_keys, optional
from sparsiattn.kernels.cost import CallShape
from sparsiattn.kernels.derivatives import transform_refusals
from sparsiattn.kernels.gather import with_dense_rows
from sparsiattn.kernels.gpu_prices import OPERATOR_CALLS
from sparsiattn.kernels.padding import list_count, slot_macs, summary_count, tile_size
from sparsiattn.kernels.prices import Work

ROWS = 64
"""Queries of one step: what a group of four warps multiplies at a time on Hopper."""
KEYS = 16
"""Sizes of blocks are multiples of this many keys."""
WIDEST_HEAD = 256
CALLS = 30.0
"""Launches around the library's kernel: packing, lists, the second attention, the merge."""
CAPABILITY = (9, 0)
NEEDED = ("softmax_scale", "block_sparse_tensors", "return_lse")
"""Arguments of the library's function that this kernel passes, beside q, k and v."""


class FlashAttention4(optional.LibraryKernel):
    """Key blocks through FlashAttention-4 (arXiv 2603.05451), forward only.

    Its block-sparse kernel for Hopper takes 64 queries at a time, and blocks of keys of any
    multiple of 16.
    """

    name = "flash_attn_4"
    summary = "key blocks on a Hopper GPU, without gradients (flash-attn-4)"
    differentiable = False

    def missing(self) -> str:
        return probe().reason

    def why_not(self, inputs: AttentionInputs, pattern: Pattern) -> list[str]:
        reasons = self.why_unavailable()
        if not isinstance(pattern, KeyBlocks):
            reasons.append(f"needs key blocks, got a {type(pattern).__name__} pattern")
        elif pattern.tiles is None:
            reasons.append("needs query tiles, got a list for every single query (tile=1)")
        else:
            reasons += _shape_refusals(inputs, pattern, pattern.tiles)
        return reasons + _operand_refusals(inputs) + transform_refusals()

    def work(self, inputs: AttentionInputs, pattern: Pattern) -> Work:
        assert isinstance(pattern, KeyBlocks)
        call, lists = CallShape.of(inputs), list_count(pattern)
        extra, tile = pattern.prefix + summary_count(pattern), tile_size(pattern)
        slots = pattern.chosen.shape[-1] * pattern.blocks.size + extra
        pairs = lists * tile * slots + pattern.dense_rows * call.keys
        # tokens are packed
        moved = call.rows_bytes(lists * slots + 3 * call.keys) + extra_keys.moved(call, extra)
        return call.attending(pairs, calls=CALLS + OPERATOR_CALLS, moved=moved)

    def uncounted_macs(self, inputs: AttentionInputs, pattern: Pattern) -> int:
        assert isinstance(pattern, KeyBlocks)
        slots = pattern.keys + summary_count(pattern)
        return slot_macs(inputs, pattern, slots)

    def warmup(self, inputs: AttentionInputs, pattern: Pattern) -> None:
        self(inputs, pattern)  # the library compiles for a new tile, block, head dim and dtype

    def __call__(self, inputs: AttentionInputs, pattern: Pattern) -> Tensor:
        assert isinstance(pattern, KeyBlocks)
        tiles = pattern.tiles
        assert tiles is not None
        if not inputs.q.numel():
            return inputs.q.new_zeros(*inputs.q.shape[:-1], inputs.v.shape[-1])
        q = tiles.gather(inputs.q[..., pattern.dense_rows :, :])
        whole, rest = divmod(pattern.keys - pattern.prefix, pattern.blocks.size)
        last = None
        if rest:  # part of the last block of every list
            last = pattern.blocks.order[:, :rest][pattern.chosen[..., whole]]
        out, lse = _over_blocks(q, inputs, pattern, whole)
        if rest or pattern.prefix or pattern.summary is not None:
            extra = extra_keys.attend(q, inputs, pattern, last)
            out = extra_keys.merged(out, lse, *extra)
        return with_dense_rows(tiles.scatter(out), inputs, pattern)


def _shape_refusals(inputs: AttentionInputs, pattern: KeyBlocks, tiles: Tiles) -> list[str]:
    reasons, blocks = [], pattern.blocks
    if tiles.size % ROWS:
        reasons.append(f"needs tiles of a multiple of {ROWS} queries, got {tiles.size}")
    most = 128 if max(inputs.q.shape[-1], inputs.v.shape[-1]) <= 128 else 64
    if not blocks.even or blocks.size % KEYS or blocks.size > most:
        sizes = f"{blocks.smallest} to {blocks.size}" if not blocks.even else f"{blocks.size}"
        reasons.append(
            f"needs blocks of equal size, a multiple of {KEYS} keys up to {most}, got {sizes}"
        )
    elif pattern.keys - pattern.prefix < blocks.size:
        reasons.append(
            f"needs a budget of at least one block of {blocks.size} keys beside the prefix keys, "
            f"got {pattern.keys - pattern.prefix}"
        )
    return reasons


def _operand_refusals(inputs: AttentionInputs) -> list[str]:
    q, dims = inputs.q, (inputs.q.shape[-1], inputs.v.shape[-1])
    reasons = optional.key_block_refusals(inputs)
    if q.device.type == "cuda" and (found := _capability(q.device))[0] != CAPABILITY[0]:
        reasons.append(
            "its tiles and blocks need a GPU of compute capability 9.0 (Hopper), got "
            f"{found[0]}.{found[1]}"
        )
    if any(dim % 8 or not 8 <= dim <= WIDEST_HEAD for dim in dims):
        reasons.append(f"needs head dims of a multiple of 8 up to {WIDEST_HEAD}, got {dims}")
    if not inputs.scale > 0:
        reasons.append(f"needs a positive scale, got {inputs.scale}")
    return reasons


def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _over_blocks(
    q: Tensor, inputs: AttentionInputs, pattern: KeyBlocks, whole: int
) -> tuple[Tensor, Tensor]:
    """Attention over the first ``whole`` blocks of every list.

    Returns:
        The result ``[B, H, T, t, Dv]`` and its log-sum-exp ``[B, H, T, t]``.
    """
    k, v = (
        pattern.blocks.gather(x[..., pattern.prefix :, :]).flatten(-3, -2)
        for x in (inputs.k, inputs.v)
    )
    loaded = probe()
    out, lse = loaded.attention(
        *(x.transpose(1, 2).contiguous() for x in (q.flatten(2, 3), k, v)),
        softmax_scale=inputs.scale,
        block_sparse_tensors=block_lists(loaded.lists, pattern, whole),
        return_lse=True,
    )[:2]
    return out.transpose(1, 2).unflatten(2, q.shape[2:4]), lse.unflatten(2, q.shape[2:4])


def block_lists(kind: Any, pattern: KeyBlocks, whole: int) -> Any:
    """The library's lists: as full blocks, of which no pair is masked, and no partial ones.

    Args:
        kind: The library's class.
        pattern: The blocks of every tile.
        whole: Number of blocks of every list to take.
    """
    tiles = pattern.tiles
    assert tiles is not None
    full = pattern.chosen[..., :whole].to(torch.int32).contiguous()
    count = torch.full_like(full[..., 0], whole)
    none = torch.zeros_like(count)
    return kind(
        mask_block_cnt=none,
        mask_block_idx=none.unsqueeze(-1),
        full_block_cnt=count,
        full_block_idx=full,
        block_size=(tiles.size, pattern.blocks.size),
    )


class Library(NamedTuple):
    """The result of `probe`.

    Attributes:
        attention: The library's function; None if it does not serve.
        lists: The class of its block lists.
        reason: Why it does not serve; empty if it does.
    """

    attention: Any
    lists: Any
    reason: str


@cache
def probe() -> Library:
    """flash-attn-4, imported once, on first use."""
    module, reason = optional.load("flash_attn.cute")
    if module is None:
        return Library(None, None, reason)
    sparsity, reason = optional.load("flash_attn.cute.block_sparsity")
    if sparsity is None:
        return Library(None, None, reason)
    attention = module.flash_attn_func
    lists = getattr(sparsity, "BlockSparseTensorsTorch", None)
    known = inspect.signature(attention).parameters
    missing = [name for name in NEEDED if name not in known]
    if lists is None or "block_size" not in getattr(lists, "_fields", ()):
        missing.append("BlockSparseTensorsTorch with block_size")
    if missing:
        return Library(None, None, f"this flash-attn-4 lacks {', '.join(missing)}")
    return Library(attention, lists, "")
