"""Penalties on attention weights, for training that makes attention sparse or peaked."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsiattn.attention.inputs import AttentionInputs
from sparsiattn.attention.site import Site
from sparsiattn.strategies.base import Planner


def log_penalty(weights: Tensor) -> Tensor:
    """Mean of ``log(1 + a^2)`` over attention weights ``[B, H, Nq, Nk]``.

    From Sparse then Prune (arXiv 2307.11988). A row sums to 1 and the function is convex there: it
    is smallest for a uniform row and largest for a row with a single key. Minimising it therefore
    spreads attention, while minimising `entropy` concentrates it.

    >>> even, single = torch.full((1, 1, 1, 4), 0.25), torch.eye(4)[None, None, :1]
    >>> bool(log_penalty(even) < log_penalty(single))
    True
    """
    return weights.square().log1p().mean()


def entropy(weights: Tensor) -> Tensor:
    """Mean entropy of the rows of ``[B, H, Nq, Nk]``, in nats: from 0 (a single key) to log Nk.

    >>> entropy(torch.eye(4)[None, None]).item()
    0.0
    """
    rows: Tensor = torch.special.entr(weights).sum(-1)
    return rows.mean()


PENALTIES = {"attention_log": log_penalty, "attention_entropy": entropy}


class PenaltyObserver:
    """An observer for `Patch.observing` that computes penalties at every site."""

    def __init__(self, names: list[str]) -> None:
        self.names = names
        self.by_site: list[Tensor] = []

    def __call__(self, site: Site, planner: Planner, inputs: AttentionInputs) -> None:
        weights = weights_of(inputs)
        self.by_site.append(torch.stack([PENALTIES[name](weights) for name in self.names]))

    def penalties(self, layers: str) -> dict[str, Tensor]:
        """Penalties by name: mean over all sites, or the last site (as in the authors' code)."""
        values = self.by_site[-1] if layers == "last" else torch.stack(self.by_site).mean(0)
        return dict(zip(self.names, values, strict=True))


def weights_of(inputs: AttentionInputs) -> Tensor:
    """The host's own attention weights ``[B, H, Nq, Nk]``, in float32 or better.

    They are computed here, as fused kernels do not return them.
    """
    q, k = inputs.q, inputs.k
    if q.dtype in (torch.float16, torch.bfloat16):
        q, k = q.float(), k.float()
    with torch.autocast(q.device.type, enabled=False):
        return inputs.biased(inputs.scale * q @ k.mT).softmax(-1)
