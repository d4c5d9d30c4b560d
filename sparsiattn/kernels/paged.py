"""Key blocks as the pages of a paged cache: each query tile is a sequence with a list of pages.

The last page of a list gives as many keys as the budget leaves, which is what the length of a
sequence says. Prefix and summary keys are a second, small attention with its own bias, merged
by the log-sum-exp of both (arXiv 2402.05099, section 3).
"""

from __future__ import annotations

import importlib
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from sparsiattn.attention.inputs import AttentionInputs
from sparsiattn.attention.key_lists import KeyBlocks
from sparsiattn.kernels.gather import dense_rows, needs_grad

HEAD_DIMS = (16, 32, 64, 128, 256, 512)
MOST_TILES = 65_535
"""The second axis of a CUDA launch, along which the operator puts its sequences."""


def refusals(ops: Any, inputs: AttentionInputs, pattern: KeyBlocks) -> list[str]:
    """Why this call cannot run; ``ops`` is None where the operators are missing anyway."""
    q, found = inputs.q, []
    device, dims = q.device.type, (q.shape[-1], inputs.v.shape[-1])
    if device not in ("cuda", "meta"):
        found.append(f"needs CUDA tensors, got {device}")
    if inputs.bias is not None:
        found.append("takes no mask of the host")
    if inputs.dropout:
        found.append("has no dropout for key blocks")
    if needs_grad(inputs):
        found.append("has no backward pass for key blocks")
    types = {x.dtype for x in (q, inputs.k, inputs.v)}
    if device != "meta" and not (len(types) == 1 and q.dtype in (torch.float16, torch.bfloat16)):
        found.append(f"needs half precision, got {', '.join(sorted(map(str, types)))}")
    if dims[0] != dims[1] or dims[0] not in HEAD_DIMS:
        found.append(f"needs equal head dims of 16, 32, 64, ... 512, got {dims}")
    found += _shape_refusals(q, pattern)
    return found + (_operator_refusals(ops, q) if ops is not None else [])


def _shape_refusals(q: Tensor, pattern: KeyBlocks) -> list[str]:
    if pattern.tiles is None:
        return ["needs query tiles, every query is alone"]
    found, blocks = [], pattern.blocks
    if not blocks.even or blocks.size % 16:
        sizes = f"{blocks.smallest} to {blocks.size}" if not blocks.even else f"{blocks.size}"
        found.append(f"needs blocks of one size, a multiple of 16 keys, got {sizes}")
    tiles = q.shape[0] * q.shape[1] * pattern.tiles.count
    if tiles > MOST_TILES:
        found.append(f"takes {MOST_TILES:,} tiles of all images and heads at most, got {tiles:,}")
    return found


def _operator_refusals(ops: Any, q: Tensor) -> list[str]:
    found = []
    if getattr(ops.triton_splitk, "_fwd_kernel_splitK", None) is None:
        found.append("its paged operator needs triton")
    elif _without_block_pointers():
        found.append("its paged operator uses block pointers, which this triton no longer has")
    if q.device.type == "cuda" and torch.cuda.get_device_capability(q.device) < (8, 0):
        found.append("its paged operator needs a GPU of compute capability 8.0")
    return found


@lru_cache(maxsize=1)
def _without_block_pointers() -> bool:
    """Whether triton's `make_block_ptr` is only left to raise, as from triton 3.9 on."""
    language = importlib.import_module("triton.language")
    try:
        language.make_block_ptr(None, (), (), (), (), (), _semantic=object())
    except NotImplementedError:
        return True
    except Exception:  # an older one gets as far as missing its compiler
        return False
    return False


def attend(ops: Any, inputs: AttentionInputs, pattern: KeyBlocks) -> Tensor:
    """``[B, H, Nq, Dv]``."""
    tiles = pattern.tiles
    assert tiles is not None
    if not inputs.q.numel():
        return torch.zeros_like(inputs.q)
    q = tiles.gather(inputs.q[..., pattern.dense_rows :, :])
    out, lse = _over_pages(ops, q, inputs, pattern)
    if pattern.prefix or pattern.summary is not None:
        extra, extra_lse = _over_extra(q, inputs, pattern)
        share = torch.sigmoid(lse - extra_lse).unsqueeze(-1)
        out = torch.lerp(extra, out.float(), share).to(q.dtype)
    patches = tiles.scatter(out)
    if not pattern.dense_rows:
        return patches
    return torch.cat([dense_rows(inputs, pattern.dense_rows), patches], dim=-2)


def _over_pages(
    ops: Any, q: Tensor, inputs: AttentionInputs, pattern: KeyBlocks
) -> tuple[Tensor, Tensor]:
    """Attention over the chosen blocks, ``[B, H, T, t, Dv]``, and its log-sum-exp ``[B, H, T,
    t]``."""
    blocks = pattern.blocks
    k, v = (
        blocks.gather(x[..., pattern.prefix :, :]).reshape(1, -1, 1, x.shape[-1])
        for x in (inputs.k, inputs.v)
    )
    operator = ops.triton_splitk.FwOp.get_operator(1, block_n=_divisor(blocks.size))
    mask = page_mask(ops, q.shape, pattern)
    out, lse = ops.memory_efficient_attention_partial(
        q.reshape(1, -1, 1, q.shape[-1]), k, v, attn_bias=mask, scale=inputs.scale, op=operator
    )
    return out.view(*q.shape[:4], -1), lse.view(q.shape[:4]).float()


def _divisor(size: int) -> int:
    """Keys that the operator takes at a time: they must divide a page."""
    return next(step for step in (64, 32, 16) if size % step == 0)


def page_mask(ops: Any, shape: torch.Size, pattern: KeyBlocks) -> Any:
    """The operator's mask for queries ``[B, H, T, t, D]``: heads are folded into the batch, so
    block ``u`` of the i-th of them is page ``i * U + u``."""
    b, h, tiles, size = shape[:4]
    count, chosen = pattern.blocks.count, pattern.chosen
    first = torch.arange(b * h, device=chosen.device).view(b, h, 1, 1) * count
    table = (chosen + first).flatten(0, 2).to(torch.int32).contiguous()
    lists, keys = b * h * tiles, pattern.keys - pattern.prefix
    kind = ops.attn_bias.PagedBlockDiagonalPaddedKeysMask
    mask = _lengths(kind, lists, size, keys, table.shape[1], pattern.blocks.size, table.device)
    return replace(mask, block_tables=table)


@lru_cache(maxsize=64)
def _lengths(
    kind: Any, lists: int, size: int, keys: int, pages: int, page: int, device: torch.device
) -> Any:
    """A mask of these lengths with an empty table: making the lengths takes longer than a call."""
    with torch.inference_mode(False):
        table = torch.zeros(lists, pages, dtype=torch.int32, device=device)
        return kind.from_seqlens([size] * lists, [keys] * lists, table, page, device=device)


def _over_extra(q: Tensor, inputs: AttentionInputs, pattern: KeyBlocks) -> tuple[Tensor, Tensor]:
    """The same over prefix and summary keys, in single precision."""
    summary, prefix = pattern.summary, pattern.prefix
    k, v = (x[..., :prefix, :] for x in (inputs.k, inputs.v))
    if summary is not None:
        k, v = (
            torch.cat([some, summary.pool(x)], -2)
            for some, x in ((k, inputs.k), (v, inputs.v))
        )  # fmt: skip
    k, v = (x.float().unsqueeze(2) for x in (k, v))
    logits = (q.float() @ k.mT) * inputs.scale
    if summary is not None:
        logits[..., prefix:] += _summary_rows(pattern)
    lse = logits.logsumexp(-1)
    dead = (lse == float("-inf")).unsqueeze(-1)  # nothing was dropped: these weigh nothing
    return logits.masked_fill(dead, 0.0).softmax(-1) @ v, lse


def _summary_rows(pattern: KeyBlocks) -> Tensor:
    """``[B|1, H|1, T, t|1, G]``."""
    tiles, summary = pattern.tiles, pattern.summary
    assert tiles is not None
    assert summary is not None
    if summary.bias.shape[-2] != tiles.count:
        return tiles.gather(summary.bias)
    return summary.bias.unsqueeze(-2)
