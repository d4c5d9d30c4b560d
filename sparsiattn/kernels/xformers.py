"""The kernel `xformers`: memory-efficient attention of xformers or of its successor mslk.

Ragged batches use a block-diagonal mask, key blocks a paged one.
"""

from __future__ import annotations

import sys
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparsiattn.attention import geometry
from sparsiattn.attention.inputs import AttentionInputs
from sparsiattn.attention.key_lists import KeyBlocks
from sparsiattn.attention.lengths import Lengths
from sparsiattn.attention.pattern import Pattern
from sparsiattn.errors import first_line
from sparsiattn.kernels import extra_keys, optional, paged
from sparsiattn.kernels.cost import CallShape
from sparsiattn.kernels.derivatives import twice_differentiable
from sparsiattn.kernels.gpu_prices import OPERATOR_CALLS
from sparsiattn.kernels.padding import list_count, slot_macs, summary_count, tile_size
from sparsiattn.kernels.prices import Work
from sparsiattn.kernels.sdpa import lengths_work
from sparsiattn.kernels.varlen import ragged_refusals

XFORMERS_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PAGED_CALLS, RAGGED_CALLS = 50.0, 10.0
"""Launches around the operators: pages and their table, the second attention, the merge; masks."""
HOMES = ("xformers.ops.fmha", "mslk.attention.fmha")


class XFormers(optional.LibraryKernel):
    """Packed images and key blocks through xformers' memory-efficient attention.

    Packed images use a `BlockDiagonalMask`. Key blocks (forward only) are the pages of a paged
    cache, with a `PagedBlockDiagonalPaddedKeysMask`.
    """

    name = "xformers"
    summary = "on CUDA: ragged batches without padding, key blocks without gradients (xformers)"

    def missing(self) -> str:
        return probe().reason

    def why_not(self, inputs: AttentionInputs, pattern: Pattern) -> list[str]:
        reasons = self.why_unavailable()
        if isinstance(pattern, KeyBlocks):
            ops = None if reasons else probe().ops
            return reasons + paged.refusals(ops, inputs, pattern)
        reasons += ragged_refusals(inputs, pattern, "images packed by length or key blocks")
        if inputs.q.dtype not in XFORMERS_DTYPES:
            reasons.append(f"needs float32, bfloat16 or float16, got {inputs.q.dtype}")
        return reasons

    def work(self, inputs: AttentionInputs, pattern: Pattern) -> Work:
        call = CallShape.of(inputs)
        if isinstance(pattern, KeyBlocks):
            return _paged_work(call, pattern)
        assert isinstance(pattern, Lengths)
        return lengths_work(call, pattern, calls=RAGGED_CALLS)

    def uncounted_macs(self, inputs: AttentionInputs, pattern: Pattern) -> int:
        if isinstance(pattern, KeyBlocks):
            slots = pattern.chosen.shape[-1] * pattern.blocks.size + pattern.prefix
            return slot_macs(inputs, pattern, slots + summary_count(pattern))
        assert isinstance(pattern, Lengths)
        return int(lengths_work(CallShape.of(inputs), pattern, calls=1.0).macs)

    def __call__(self, inputs: AttentionInputs, pattern: Pattern) -> Tensor:
        ops = probe().ops
        if isinstance(pattern, KeyBlocks):
            return paged.attend(ops, inputs, pattern)
        assert isinstance(pattern, Lengths)
        device = inputs.q.device
        mask = _images(ops.attn_bias.BlockDiagonalMask, pattern.lengths, device)
        geometry.hold_if_captured(mask, self.name, pattern.lengths, device=device)
        q, k, v = (x.transpose(1, 2) for x in (inputs.q, inputs.k, inputs.v))
        out: Tensor = ops.memory_efficient_attention(
            q, k, v, attn_bias=mask, p=inputs.dropout, scale=inputs.scale
        )
        return twice_differentiable(self.name, out.transpose(1, 2), inputs, pattern)


@lru_cache(maxsize=64)
def _images(kind: Any, lengths: tuple[int, ...], device: torch.device) -> Any:
    """The operator's mask for images of these lengths, cached for the layers of a model."""
    with torch.inference_mode(False):
        mask = kind.from_seqlens(list(lengths), device=device)
        geometry.wait_for_values(device)
        return mask


def _paged_work(call: CallShape, pattern: KeyBlocks) -> Work:
    """Work of the paged operator: every few queries of a tile read all of its pages again."""
    lists, pages = list_count(pattern), pattern.chosen.shape[-1] * pattern.blocks.size
    tile, extra = tile_size(pattern), pattern.prefix + summary_count(pattern)
    rows = paged.launch_settings(tile, call.dim, pattern.blocks.size)["block_m"]
    parts = -(-tile // rows)
    pairs = lists * parts * rows * (pages + extra) + pattern.dense_rows * call.keys
    # pages are copied
    moved = call.rows_bytes(lists * parts * pages + 4 * call.keys) + extra_keys.moved(call, extra)
    return call.attending(pairs, calls=PAGED_CALLS + OPERATOR_CALLS, moved=moved)


class Operators(NamedTuple):
    """The result of `probe`.

    Attributes:
        ops: The module with the operators; None if no module works.
        reason: Why no module works; empty if one does.
    """

    ops: Any
    reason: str


@cache
def probe() -> Operators:
    """The first of xformers and mslk that works here; imported once, on first use."""
    reasons = []
    for home in HOMES:
        loaded = _load(home)
        if loaded.ops is not None:
            return loaded
        reasons.append(loaded.reason)
    return Operators(None, "; ".join(reasons))


def _load(home: str) -> Operators:
    """Import one of the modules. A wheel for another version may load without its operators."""
    ops, reason = optional.load(home)
    if ops is None:
        return Operators(None, reason)
    fault = _missing_operators(home.partition(".")[0], ops)
    return Operators(None, fault) if fault else Operators(ops, "")


def _missing_operators(name: str, ops: Any) -> str:
    """Why xformers has no operator for ragged batches; empty if it has one.

    It imports without its CUDA extension, as in a wheel for another CUDA version. Its attention
    does not need it: it calls operators of torch or of other packages.
    """
    if name != "xformers":
        return ""
    families = (getattr(ops, family, None) for family in ("flash", "cutlass"))
    if any(family is not None and family.FwOp.is_available() for family in families):
        return ""
    reason = "xformers has no attention operator for this torch"
    library = sys.modules.get("xformers._cpp_lib")
    error = getattr(library, "_cpp_library_load_exception", None)
    return reason if error is None else f"{reason} ({first_line(error.__cause__ or error)})"
