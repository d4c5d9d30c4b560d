"""Fit the prices of kernel work to measured times."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple

import torch
from torch import Tensor

from sparsiattn.kernels import Prices, Work


def fit(known: Sequence[tuple[Work, float]], start: Prices, ridge: float = 0.01) -> Prices:
    """Fit prices to measured times.

    It is a least squares fit of log time over log prices with the Levenberg-Marquardt method, so
    that prices are positive and short calls count as much as long ones.

    Args:
        known: Works and their times in seconds.
        start: Initial prices.
        ridge: Strength of the pull towards the initial prices, which keeps prices that the works
            do not determine.

    Returns:
        The fitted prices.
    """
    features = torch.tensor([work.features() for work, _ in known], dtype=torch.float64)
    log_seconds = torch.tensor([seconds for _, seconds in known], dtype=torch.float64).log()
    begin = torch.tensor(astuple(start), dtype=torch.float64).log()
    identity = torch.eye(len(begin), dtype=torch.float64)

    def loss(log_prices: Tensor) -> float:
        error = (features @ log_prices.exp()).log() - log_seconds
        return float((error**2).sum() + ridge * ((log_prices - begin) ** 2).sum())

    log_prices, damping = begin.clone(), 1.0
    for _ in range(100):
        paid = features * log_prices.exp()
        slope = paid / paid.sum(1, keepdim=True)
        error = paid.sum(1).log() - log_seconds
        normal = slope.mT @ slope + ridge * identity
        gradient = slope.mT @ error + ridge * (log_prices - begin)
        step = torch.linalg.solve(normal + damping * identity, gradient)
        if loss(log_prices - step) < loss(log_prices):
            log_prices, damping = log_prices - step, damping / 3
        else:
            damping *= 3
    return Prices(*log_prices.exp().tolist())
