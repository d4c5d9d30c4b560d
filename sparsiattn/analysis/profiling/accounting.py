"""How multiply-accumulates are counted: what runs, and the rules of the Sparsifiner paper."""

from __future__ import annotations

from typing import Literal, get_args

from sparsiattn.analysis.profiling.meter import CountedCall
from sparsiattn.strategies.base import Planner
from sparsiattn.strategies.connectivity import ConnectivityPlanner

Accounting = Literal["own", "computed", "paper"]
"""How the headline figures count.

``"own"``: the pairs that a pattern keeps, summary keys and their pooling included, and all that
choosing costs. ``"computed"``: the same, but every pair that a kernel works out, padding and masked
pairs too. ``"paper"``: as the tables of Sparsifiner (CVPR 2023) count."""
ACCOUNTINGS: tuple[str, ...] = get_args(Accounting)

TOKENS_PER_BASIS = 6.0
"""Keys for each basis vector in the paper's settings: 32 of them for 197 keys."""
UP_MACS = 5.5
"""MACs of the sparse up-projection for each (query, key) pair of one head. The paper does not say;
with this one constant all eleven rows of its table of DeiT-S come out within 0.1 M, which is what
the rows themselves deviate from a line. Its joint table of tokens and keys does not come out."""


def paper_macs(
    call: CountedCall, planner: Planner | None, keys: int, planned: float
) -> tuple[float, float]:
    """Count one call as the Sparsifiner paper does.

    Rows of prefix tokens are dense; background keys, tiles and salience are not in the paper and
    cost nothing. The predictor is two products with ``K`` basis vectors, ``(Nq + Nk) K D`` for each
    head, and the up-projection.

    Args:
        call: What was counted.
        planner: Of the site; None where the host's own attention ran.
        keys: Keys of the site while no token is dropped, which ``K`` goes by.
        planned: MACs of the planner that ran; the paper has none but `connectivity`'s. Where keys
            are ranked by logits as attention computes them, those that it does not need count.

    Returns:
        MACs of QK^T and AV over the kept pairs, and of the predictor.

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
