"""Key blocks as the pages of a paged cache: each query tile is a sequence with a list of pages.

The length of a sequence cuts its last page, so that a list holds exactly as many keys as the budget
allows. Prefix and summary keys are a second, small attention with its own bias; the log-sum-exp of
both merges the results (arXiv 2402.05099, section 3).
"""

from __future__ import annotations

import importlib
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from sparsiattn.attention import geometry
from sparsiattn.attention.inputs import AttentionInputs
from sparsiattn.attention.key_lists import KeyBlocks
from sparsiattn.kernels import extra_keys, optional
from sparsiattn.kernels.derivatives import transform_refusals
from sparsiattn.kernels.gather import with_dense_rows

HEAD_DIMS = (16, 32, 64, 128, 256, 512)
MOST_TILES = 65_535
"""Limit of the second axis of a CUDA grid, along which the operator launches its sequences."""


def refusals(ops: Any, inputs: AttentionInputs, pattern: KeyBlocks) -> list[str]:
    """Reasons why this call cannot run; empty if it can.

    Args:
        ops: The module with the operators; None if they are missing.
        inputs: The operands of the call.
        pattern: Its key blocks.
    """
    q, reasons = inputs.q, optional.key_block_refusals(inputs)
    dims = q.shape[-1], inputs.v.shape[-1]
    if dims[0] != dims[1] or dims[0] not in HEAD_DIMS:
        reasons.append(f"needs equal head dims of 16, 32, 64, ... 512, got {dims}")
    reasons += _shape_refusals(q, pattern) + transform_refusals()
    return reasons if ops is None else reasons + _operator_refusals(ops, q)


def _shape_refusals(q: Tensor, pattern: KeyBlocks) -> list[str]:
    if pattern.tiles is None:
        return ["needs query tiles, got a list for every single query (tile=1)"]
    reasons, blocks = [], pattern.blocks
    if not blocks.even or blocks.size % 16:
        sizes = f"{blocks.smallest} to {blocks.size}" if not blocks.even else f"{blocks.size}"
        reasons.append(f"needs blocks of equal size, a multiple of 16 keys, got {sizes}")
    tiles = q.shape[0] * q.shape[1] * pattern.tiles.count
    if tiles > MOST_TILES:
        reasons.append(f"needs at most {MOST_TILES:,} tiles over images and heads, got {tiles:,}")
    return reasons


def _operator_refusals(ops: Any, q: Tensor) -> list[str]:
    reasons = []
    if getattr(ops.triton_splitk, "_fwd_kernel_splitK", None) is None:
        reasons.append("its paged operator needs triton")
    elif _without_block_pointers():
        reasons.append("its paged operator needs block pointers, which this triton has removed")
    if q.device.type == "cuda" and torch.cuda.get_device_capability(q.device) < (8, 0):
        reasons.append("its paged operator needs a GPU of compute capability 8.0")
    return reasons


@lru_cache(maxsize=1)
def _without_block_pointers() -> bool:
    """Whether triton's `make_block_ptr` only raises, as from triton 3.9 on."""
    language = importlib.import_module("triton.language")
    try:
        language.make_block_ptr(None, (), (), (), (), (), _semantic=object())
    except NotImplementedError:
        return True
    except Exception:  # an older version fails later, for lack of a compiler
        return False
    return False


def attend(ops: Any, inputs: AttentionInputs, pattern: KeyBlocks) -> Tensor:
    """Attention through the module ``ops``, ``[B, H, Nq, Dv]``."""
    tiles = pattern.tiles
    assert tiles is not None
    if not inputs.q.numel():
        return torch.zeros_like(inputs.q)
    q = tiles.gather(inputs.q[..., pattern.dense_rows :, :])
    out, lse = _over_pages(ops, q, inputs, pattern)
    if pattern.prefix or pattern.summary is not None:
        out = extra_keys.merged(out, lse, *extra_keys.attend(q, inputs, pattern))
    return with_dense_rows(tiles.scatter(out), inputs, pattern)


def _over_pages(
    ops: Any, q: Tensor, inputs: AttentionInputs, pattern: KeyBlocks
) -> tuple[Tensor, Tensor]:
    """Attention over the chosen blocks.

    Returns:
        The result ``[B, H, T, t, Dv]`` and its log-sum-exp ``[B, H, T, t]``.
    """
    blocks = pattern.blocks
    k, v = (
        blocks.gather(x[..., pattern.prefix :, :]).reshape(1, -1, 1, x.shape[-1])
        for x in (inputs.k, inputs.v)
    )
    settings = launch_settings(q.shape[-2], q.shape[-1], blocks.size)
    operator = ops.triton_splitk.FwOp.get_operator(1, **settings)
    mask = page_mask(ops, q.shape, pattern)
    out, lse = ops.memory_efficient_attention_partial(
        q.reshape(1, -1, 1, q.shape[-1]), k, v, attn_bias=mask, scale=inputs.scale, op=operator
    )
    return out.view(*q.shape[:4], -1), lse.view(q.shape[:4]).float()


def launch_settings(tile: int, dim: int, page: int) -> dict[str, int]:
    """How the operator cuts a call: queries and keys at a time, warps, and pages loaded ahead.

    Its own choice is 16 queries at a time, which reads all pages of a tile of 64 queries four
    times, and no page ahead. Estimates from the memory of a GPU: not measured yet.

    Args:
        tile: Number of queries of a tile.
        dim: Head dim.
        page: Number of keys of a page.
    """
    rows = next((rows for rows in (16, 32) if tile <= rows), 64)
    return {
        "block_m": rows,
        "block_n": next(step for step in (64, 32, 16) if page % step == 0),
        "num_warps": 4 if rows == 64 else 2,
        # pages of keys and values in shared memory, at most 48 KiB of each
        "num_stages": 3 if dim <= 64 else 2 if dim <= 128 else 1,
    }


def page_mask(ops: Any, shape: torch.Size, pattern: KeyBlocks) -> Any:
    """The operator's mask.

    Heads are folded into the batch, so block ``u`` of the i-th head overall is page ``i * U + u``.

    Args:
        ops: The module with the operators.
        shape: Shape of the queries, ``[B, H, T, t, D]``.
        pattern: The blocks of every tile.
    """
    b, h, tiles, size = shape[:4]
    count, chosen = pattern.blocks.count, pattern.chosen
    first = torch.arange(b * h, device=chosen.device).view(b, h, 1, 1) * count
    table = (chosen + first).flatten(0, 2).to(torch.int32).contiguous()
    lists, keys = b * h * tiles, pattern.keys - pattern.prefix
    kind = ops.attn_bias.PagedBlockDiagonalPaddedKeysMask
    sizes = lists, size, keys, table.shape[1], pattern.blocks.size
    mask = _lengths(kind, *sizes, table.device)
    geometry.hold_if_captured(mask, "pages", *sizes, device=table.device)
    return replace(mask, block_tables=table)


@lru_cache(maxsize=64)
def _lengths(
    kind: Any, lists: int, size: int, keys: int, pages: int, page: int, device: torch.device
) -> Any:
    """A mask of these lengths with an empty table, cached since building it outlasts a call."""
    # an inference tensor cached from one call would break later ones that trace or train
    with torch.inference_mode(False):
        table = torch.zeros(lists, pages, dtype=torch.int32, device=device)
        mask = kind.from_seqlens([size] * lists, [keys] * lists, table, page, device=device)
        geometry.wait_for_values(device)
        return mask
