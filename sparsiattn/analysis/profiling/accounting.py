"""Accounting rules of multiply-accumulates: as computed, and as in the Sparsifiner paper."""

from __future__ import annotations

from typing import Literal, get_args

from sparsiattn.analysis.profiling.meter import CountedCall
from sparsiattn.strategies.base import Planner
from sparsiattn.strategies.connectivity import ConnectivityPlanner

Accounting = Literal["own", "computed", "paper"]
"""The accounting rule of the headline figures.

``"own"`` counts the pairs that a pattern keeps, including summary keys and their pooling, and the
cost of selecting keys and tokens. ``"computed"`` counts every pair that a kernel computes instead,
including padding and masked pairs. ``"paper"`` counts as the tables of Sparsifiner (CVPR 2023)."""
ACCOUNTINGS: tuple[str, ...] = get_args(Accounting)

TOKENS_PER_BASIS = 6.0
"""Number of keys per basis vector in the paper's settings: 32 vectors for 197 keys."""
UP_MACS = 5.5
"""MACs of the sparse up-projection for each (query, key) pair of one head. The paper does not give
it. With this constant, all eleven rows of its DeiT-S table are matched within 0.1 M, which is the
deviation of the rows themselves from a line. Its joint table of tokens and keys is not matched."""


def paper_macs(
    call: CountedCall, planner: Planner | None, keys: int, planned: float
) -> tuple[float, float]:
    """Count one call as the Sparsifiner paper does.

    Rows of prefix tokens are dense. Background keys, tiles and salience are not in the paper and
    cost nothing. The predictor consists of two products with ``K`` basis vectors, ``(Nq + Nk) K D``
    for each head, and the up-projection.

    Args:
        call: The counted call.
        planner: The site's planner; None if the host's own attention ran.
        keys: Number of keys of the site before tokens are dropped, which determines ``K``.
        planned: MACs of the planner that ran, used for planners other than `connectivity`'s. If
            keys are ranked by attention's own logits, logits of dropped pairs count instead.

    Returns:
        MACs of QK^T and AV over the kept pairs, and MACs of the predictor.

    >>> call = CountedCall("attn", 6, 197, 197, 64, 128, 196 * 50 + 197, 197 ** 2, 0.0)
    >>> rows, predictor = paper_macs(call, None, 197, 0.0)
    >>> rows == 2 * (196 * 50 + 197) * 384, predictor
    (True, 0.0)
    """
    rows = call.pairs * call.width * call.lists
    if call.choice is None:
        return rows, 0.0
    if not isinstance(planner, ConnectivityPlanner) or not planner.predicts:
        return rows, planned or max(0.0, call.macs - rows)
    strategy = planner.strategy
    basis = strategy.basis or int(keys // (strategy.tokens_per_basis or TOKENS_PER_BASIS))
    products = (call.queries + call.keys) * basis * call.dim
    return rows, call.lists * (products + UP_MACS * call.queries * call.keys)
