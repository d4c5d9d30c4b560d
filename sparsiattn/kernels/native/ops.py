"""The compiled code as operators of torch, opaque to its compiler; forward only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsiattn.kernels.native import build, launch

_NAME = "sparsiattn::native_attention"

# defined by hand: the Python around `torch.library.custom_op` costs as much as a small call
torch.library.define(
    _NAME,
    "(Tensor q, Tensor k, Tensor v, Tensor chosen, Tensor? table, Tensor? held, Tensor? order, "
    "Tensor? cells, Tensor? bias, int count, int listed, int prefix, int first, float scale) "
    "-> Tensor",
)


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chosen: Tensor,
    table: Tensor | None,
    held: Tensor | None,
    order: Tensor | None,
    cells: Tensor | None,
    bias: Tensor | None,
    count: int,
    listed: int,
    prefix: int,
    first: int,
    scale: float,
) -> Tensor:
    """Attention of query tiles to their lists, ``[B, H, first + n, Dv]``.

    q, k, v: ``[B, H, N, D]`` float32 of any strides, ``first`` and ``prefix`` leading tokens of
    queries and keys included; leading queries see every key. chosen: keys, or blocks of ``table``,
    of every tile, ``[B|1, H|1, T, C]``; with a table lists begin with the prefix. table: patch keys
    of every block, ``[U, g]``. held: how many of these count, ``[U]``; None means all. order: patch
    queries of every tile, ``[T, t]``; None where each is alone. cells: cell of every key, ``[Nk]``,
    G for none. bias: the summary's logits, ``[B|1, H|1, T or n, G]``; None for the log of how many
    of a cell's keys a list leaves out. count: G, 0 without a summary. listed: length of every list.
    """
    rows = None if bias is None else bias.to(torch.float32)
    return launch.attend(
        build.code().attend, _rows(q), _rows(k), _rows(v), chosen.contiguous(), _whole(table),
        _whole(held), _whole(order), _whole(cells), _whole(rows), count, listed, prefix, first,
        scale,
    )  # fmt: skip


torch.library.impl(_NAME, "CPU", _run)


def _rows(x: Tensor) -> Tensor:
    """With rows that are contiguous, as the compiled code reads them; the other axes have steps."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _whole(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


@torch.library.register_fake(_NAME)  # type: ignore[untyped-decorator]
def _shape(q: Tensor, k: Tensor, v: Tensor, *others: object) -> Tensor:
    b, h, n, _ = q.shape
    # laid out as torch's own attention does, so that the host's reshape copies nothing
    return q.new_empty(b, n, h, v.shape[-1]).transpose(1, 2)


_SCORES = "sparsiattn::native_scores"
torch.library.define(
    _SCORES,
    "(Tensor q, Tensor k, Tensor order, Tensor? held, Tensor block_order, Tensor? block_held, "
    "Tensor down, Tensor up, Tensor? own, Tensor? shares, int count, int prefix, float scale, "
    "float basis_scale, float threshold, bool salience) -> (Tensor, Tensor)",
)


def _score(
    q: Tensor,
    k: Tensor,
    order: Tensor,
    held: Tensor | None,
    block_order: Tensor,
    block_held: Tensor | None,
    down: Tensor,
    up: Tensor,
    own: Tensor | None,
    shares: Tensor | None,
    count: int,
    prefix: int,
    scale: float,
    basis_scale: float,
    threshold: float,
    salience: bool,
) -> tuple[Tensor, Tensor]:
    """Scores of `connectivity`, ``[B, H, T, U]``, and the places of the best of each row, as `_top`
    gives them, ``[B, H, T, count]``; see `sparsiattn.kernels.native.scores`.

    q, k: ``[B, H, N, D]`` float32. order, block_order: patch tokens of tiles ``[T, t]`` and blocks
    ``[U, g]``; held, block_held: how many of them count, None means all. down, up: ``[P + U, K]``.
    threshold: entries of abs(up) up to it are zero. shares: ``[T, U]``, what ``own`` ``[1]``
    multiplies.
    """
    return launch.score(
        build.code().score, _rows(q), _rows(k), order.contiguous(), _whole(held),
        block_order.contiguous(), _whole(block_held), down.contiguous(), up.contiguous(),
        own, _whole(shares), count, prefix, scale, basis_scale, threshold, salience,
    )  # fmt: skip


torch.library.impl(_SCORES, "CPU", _score)


@torch.library.register_fake(_SCORES)  # type: ignore[untyped-decorator]
def _scores_shape(q: Tensor, k: Tensor, order: Tensor, held: Tensor | None, block_order: Tensor,
                  block_held: Tensor | None, down: Tensor, up: Tensor, own: Tensor | None,
                  shares: Tensor | None, count: int,
                  *others: object) -> tuple[Tensor, Tensor]:  # fmt: skip
    rows = (*q.shape[:2], order.shape[0])
    return q.new_empty(*rows, block_order.shape[0]), q.new_empty(*rows, count, dtype=torch.int64)


def _scores_flops(q_shape: Any, k_shape: Any, order_shape: Any, held_shape: Any,
                  block_shape: Any, block_held_shape: Any, down_shape: Any, *others: Any,
                  **options: Any) -> int:  # fmt: skip
    """Those of the same products in torch."""
    (b, h, _, d), tiles, (units, basis) = q_shape, order_shape[0], down_shape
    blocks, prefix, salience = block_shape[0], others[4], others[8]
    macs = basis * units * d + tiles * basis * (d + blocks)
    if salience:
        macs += units * (d + 2 * basis) + (k_shape[-2] - prefix) * d
    return int(2 * b * h * macs)


FLOP_FORMULAS = {torch.ops.sparsiattn.native_scores: _scores_flops}
"""For `torch.utils.flop_counter`, whose import brings triton: `mac_counter` gives it these."""


_TOP = "sparsiattn::native_top"
torch.library.define(_TOP, "(Tensor scores, int count) -> Tensor")


@torch.library.impl(_TOP, "CPU")
def _top(scores: Tensor, count: int) -> Tensor:
    """Places of the ``count`` best of each row of ``[..., U]`` float32, best first and of equal
    ones the first first, ``[..., count]``; NaN counts as largest."""
    return launch.top(build.code().top, scores.contiguous(), count)


@torch.library.register_fake(_TOP)  # type: ignore[untyped-decorator]
def _top_shape(scores: Tensor, count: int) -> Tensor:
    return scores.new_empty(*scores.shape[:-1], count, dtype=torch.int64)


native_top = torch.ops.sparsiattn.native_top.default


def unwatched(q: Tensor, k: Tensor) -> bool:
    """Whether nothing wants to see operators on these: no tracer, mode, transform or profiler. They
    may then be left out: between two layers, where the caches hold other code, torch's dispatch of
    one takes a tenth of the time of a small site."""
    return (
        type(q) is Tensor
        and type(k) is Tensor
        and not torch.compiler.is_compiling()
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._autograd._profiler_enabled()
        and torch._C._get_tracing_state() is None
        and torch._C._functorch.peek_interpreter_stack() is None
    )


def scores(q: Tensor, k: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    """As the operator ``native_scores``."""
    if unwatched(q, k):
        return _score(q, k, *others)
    found: tuple[Tensor, Tensor] = torch.ops.sparsiattn.native_scores.default(q, k, *others)
    return found


def attention(q: Tensor, k: Tensor, v: Tensor, *others: Any) -> Tensor:
    """As the operator ``native_attention``."""
    if type(v) is Tensor and unwatched(q, k):
        return _run(q, k, v, *others)
    found: Tensor = torch.ops.sparsiattn.native_attention.default(q, k, v, *others)
    return found
