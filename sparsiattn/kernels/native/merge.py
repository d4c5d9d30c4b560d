"""Token merging in compiled code: the search for similar tokens, and the shorter sequence."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsiattn.attention.derivatives import is_tracing, is_unobserved
from sparsiattn.kernels.native import build, entries
from sparsiattn.kernels.native.ops import (
    FLOP_FORMULAS,
    SPAN,
    addresses_of,
    contiguous,
    parallel,
    whole_vectors,
    with_rows,
)
from sparsiattn.kernels.native.scores import serves
from sparsiattn.kernels.workspace import SCRATCH

# as in merge.c
ROWS_AT_ONCE = 6
# approximate memory, in floats, of the images that are merged at once
MERGED_AT_ONCE = 1 << 20

_MERGED = "sparsiattn::native_merged"
torch.library.define(
    _MERGED,
    "(Tensor k, Tensor x, Tensor? size, int merged, int prefix, int ahead) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)

Merged = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def _merged(
    k: Tensor, x: Tensor, size: Tensor | None, merged: int, prefix: int, ahead: int
) -> Merged:
    """Bipartite soft matching of alternate tokens (ToMe, section 3.1), and the merged sequence.

    Args:
        k: Keys ``[B, H, P + n, D]`` float32 of any strides; their mean over heads measures
            similarity.
        x: Tokens ``[B, n, C]`` float32.
        size: Number of patches in each token, ``[B, n]`` float32; None if all are 1.
        merged: Number of tokens to remove, 1 to n // 2.
        prefix: Number of leading keys that are never merged, P. Counted with them, tokens at even
            positions are matched to tokens at odd ones.
        ahead: Number of rows before ``x`` in memory, with its strides, that are copied to the
            start of every new sequence.

    Returns:
        The new sequences ``[B, ahead + m, C]``: remaining tokens of even positions in order, then
        those of odd positions. The token that each one stands for, ``[B, m]``, and the new position
        of each earlier token, ``[B, n]``. The new sizes ``[B, m]``, and their logarithms,
        ``[B, 1, 1, ahead + m]``.
    """
    k, size = with_rows(k), contiguous(size)
    (b, h, _, d), (n, width) = k.shape, x.shape[1:]
    left, threads = n - merged, torch.get_num_threads()
    # `pairs_of` in merge.c divides this memory
    side = whole_vectors(n // 2 + 1)
    shared = side * whole_vectors(d) + (side + SPAN) * d + 8 * side
    each = max(whole_vectors(d), ROWS_AT_ONCE * SPAN)
    group = max(1, min(b, MERGED_AT_ONCE // shared))
    scratch = SCRATCH.numbers("merge", group * shared + threads * each, k)
    out, sizes = torch.empty(b, ahead + left, width), torch.empty(b, left)
    logs, index = torch.empty(b, 1, 1, ahead + left), torch.empty(b, left, dtype=torch.int64)
    assign = torch.empty(b, n, dtype=torch.int64)
    steps = (*k.stride()[:3], *x.stride()[:2])
    numbers = (b, h, d, prefix, n, merged, width, ahead, *steps, threads, group, shared, each)
    addresses = addresses_of(k, x, size, out, sizes, logs, index, assign, scratch)
    build.code().merge(entries.MERGE_CALL.pack(*numbers, *addresses, parallel()))
    return out, index, assign, sizes, logs


torch.library.impl(_MERGED, "CPU", _merged)


@torch.library.register_fake(_MERGED)  # type: ignore[untyped-decorator]
def _merged_shape(
    k: Tensor, x: Tensor, size: Tensor | None, merged: int, prefix: int, ahead: int
) -> Merged:
    b, n, width = x.shape
    index, left = k.new_empty(b, n, dtype=torch.int64), n - merged
    out, sizes = x.new_empty(b, ahead + left, width), x.new_empty(b, left)
    return out, index[:, :left].clone(), index, sizes, x.new_empty(b, 1, 1, ahead + left)


def _merged_flops(k_shape: Any, x_shape: Any, *others: Any, **options: Any) -> int:
    """FLOPs of the cosine similarities."""
    (b, *_, d), n = k_shape, x_shape[1]
    return int(2 * b * d * (n // 2) * (n - n // 2))


FLOP_FORMULAS[torch.ops.sparsiattn.native_merged] = _merged_flops


def merges(k: Tensor, x: Tensor, size: Tensor | None) -> bool:
    """Whether `merged` takes these operands: float32 on a CPU, without gradients."""
    return (
        x.stride(-1) == 1 and not is_tracing() and serves(k, x) and (size is None or serves(size))
    )


def merged(k: Tensor, x: Tensor, *others: Any) -> Merged:
    """The operator ``native_merged``, called directly where nothing observes operators."""
    operator = _merged if is_unobserved(k, x) else torch.ops.sparsiattn.native_merged.default
    return operator(k, x, *others)
