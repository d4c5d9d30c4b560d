"""Planning on a GPU in Triton: whether its kernels serve a call, and what they find."""

from __future__ import annotations

import importlib.util
from functools import cache

import torch
from torch import Tensor

from sparsiattn.attention import geometry
from sparsiattn.attention.background import Summary, cell_members, key_cells, key_counts
from sparsiattn.attention.derivatives import is_exporting, is_transformed
from sparsiattn.attention.geometry import Grid
from sparsiattn.attention.top_logits import TopLogits
from sparsiattn.kernels._triton.plan_ops import pool_cells, voted_keys

TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
WIDEST_HEAD = 256
MOST_KEYS = 1 << 14
"""Patch keys of a call that are ranked: more votes of a tile would not fit the registers."""
MOST_VOTERS = 64
"""Voters of a tile that one program holds."""


@cache
def is_installed() -> bool:
    """Whether triton is, in a version whose histograms take a mask (3.4)."""
    found = importlib.util.find_spec("triton")
    if found is None:
        return False
    from importlib.metadata import PackageNotFoundError, version

    try:
        major, minor = version("triton").split(".")[:2]
    except PackageNotFoundError:
        return False
    return (int(major), int(minor)) >= (3, 4)


def is_planned_on(device: torch.device) -> bool:
    """Whether a device is a GPU with the instructions that the kernels use (capability 8.0)."""
    return device.type == "cuda" and is_installed() and _is_capable(device)


# as `torch.compiler.assume_constant_result` does, which would import all of Dynamo
is_planned_on._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def _is_capable(device: torch.device) -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability(device) >= (8, 0)


def serves(pattern: TopLogits) -> bool:
    """Whether the kernels `vote` and `rank` choose the keys of a call.

    Not in exported programs, which run elsewhere, nor under a host's bias or mask.
    """
    inputs, tiles = pattern.inputs, pattern.inputs.tiles
    q, k = inputs.q, inputs.k
    if tiles is None or inputs.bias is not None or not is_planned_on(q.device):
        return False
    if q.dtype not in TRITON_DTYPES or k.dtype != q.dtype or q.shape[-1] > WIDEST_HEAD:
        return False
    if inputs.n_keys - inputs.prefix > MOST_KEYS or is_exporting() or is_transformed():
        return False
    voters = pattern.voter_tokens[1].shape[0] // tiles.count
    return voters <= MOST_VOTERS


def voted_lists(pattern: TopLogits, keys: int, parts: Grid | None) -> tuple[Tensor, Tensor | None]:
    """The lists of `voted_keys`, and the bias of summary keys; a choice has no gradient.

    Args:
        pattern: The call.
        keys: Length of every list.
        parts: Rows and columns of the summary's cells; None without a summary.
    """
    inputs, tiles = pattern.inputs, pattern.inputs.tiles
    assert tiles is not None
    cells = total = None
    if parts is not None:
        sizes = inputs.key_grid, parts, inputs.prefix
        cells, total = inputs.table(key_cells, *sizes), inputs.table(key_counts, *sizes)
    order, held = pattern.voter_tokens
    numbers = tiles.count, keys, inputs.prefix, inputs.scale
    q, k = inputs.q.detach(), inputs.k.detach()
    index, bias = voted_keys(q, k, order, held, *numbers, cells, total)
    return index, None if parts is None else bias


def pooled(summary: Summary, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """`Summary.pool` of keys and of values, in one pass where the cells are those of a grid."""
    source, parts = summary.source, summary.parts
    if source is None or any(n < cells for n, cells in zip(source[0], parts, strict=True)):
        return summary.pool(k), summary.pool(v)
    allowed = summary.allowed
    sizes = source[0], parts, source[1]
    members = geometry.table(cell_members, *sizes, device=k.device)
    masks = None if allowed is None else allowed.squeeze(-2)
    means: tuple[Tensor, Tensor] = pool_cells(k, v, summary.cells, *members, masks)
    return means
