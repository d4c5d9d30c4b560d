"""Guided low-rank attention: logits from few channels, weighted by a guide for each image.

After GLMHA, arXiv 2410.00380.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsiattn import AttentionInputs, InvalidOption, Pattern, Site, Strategy, count_of
from sparsiattn.methods._computed import ComputedPlanner, host_bias
from sparsiattn.methods._options import check_count
from sparsiattn.methods._weights import frozen, generator


@dataclass(frozen=True)
class LowRank(Strategy):
    """Logits from r of the head's channels: ``Q E_q diag(g) (K E_k)^T`` with a guide g per image.

    It starts with g = 1 and a random orthogonal E, so it needs calibration, which initialises E to
    the best matrix of that rank.

    Args:
        rank: r, as a share of the head dim or a count.
        guide: Hidden channels of the network that computes ``g = 2 sigmoid(MLP(mean query))`` for
            all heads; None for g = 1.

    >>> LowRank(rank=16).to_dict()["options"]["guide"]
    16
    """

    name = "lowrank"
    paper = "https://arxiv.org/abs/2410.00380"
    fidelity = (
        "inspired by: the paper factorises channel attention of restoration models, and its "
        "formulas could not be confirmed; here logits between tokens have guided low-rank factors, "
        "so QK^T uses r channels and AV all"
    )
    needs_training = True
    selects_keys = False

    rank: float = 0.25
    guide: int | None = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        share = isinstance(self.rank, float) and 0 < self.rank <= 1
        if not share and (type(self.rank) is not int or self.rank < 1):
            raise InvalidOption(
                "rank must be a float in (0, 1] (a share of the head dim) or an int >= 1, got "
                f"{self.rank!r}"
            )
        if self.guide is not None:
            check_count("guide", self.guide)

    def planner(self, site: Site) -> LowRankPlanner:
        return LowRankPlanner(self, site)


class LowRankPlanner(ComputedPlanner):
    """The factors of one site.

    Attributes:
        map_q: ``[H, D, r]``, map of queries.
        map_k: ``[H, D, r]``, map of keys.
        hidden: ``[H D, guide]``, first layer of the guide; None without a guide.
        last: ``[guide, H r]``, last layer of the guide; absent without a guide.
    """

    def __init__(self, strategy: LowRank, site: Site) -> None:
        super().__init__()
        dim = site.head_dim
        rank = count_of(strategy.rank, dim)
        random = generator(site.name)
        start = torch.empty(site.heads, dim, rank)
        for head in start:
            nn.init.orthogonal_(head, gain=math.sqrt(math.sqrt(dim / rank)), generator=random)
        self.map_q, self.map_k = frozen(start.clone()), frozen(start.clone())
        self.hidden: nn.Parameter | None = None
        if strategy.guide is not None:
            width = site.heads * dim
            hidden = torch.randn(width, strategy.guide, generator=random)
            self.hidden = frozen(hidden / math.sqrt(width))
            self.last = frozen(torch.zeros(strategy.guide, site.heads * rank))

    def forward(self, inputs: AttentionInputs) -> Pattern:
        q = inputs.patch_queries @ self.map_q.to(inputs.q.dtype) * self.guide(inputs)
        k = inputs.k @ self.map_k.to(inputs.k.dtype)
        return Pattern.computed_keys(inputs, k, inputs.v, q=q, bias=host_bias(inputs))

    def guide(self, inputs: AttentionInputs) -> Tensor:
        """The guide ``[B, H, 1, r]``; the scalar 1 without a network."""
        if self.hidden is None:
            return inputs.q.new_ones(())
        mean = inputs.mean_query.flatten(1)
        logits = F.gelu(mean @ self.hidden.to(mean.dtype)) @ self.last.to(mean.dtype)
        gate: Tensor = logits.sigmoid().unflatten(-1, (inputs.q.shape[1], 1, -1))
        return 2 * gate

    @torch.no_grad()
    def init_from_batch(self, inputs: AttentionInputs) -> None:
        """Set the maps to the best low-rank approximation of the logits.

        The approximation is optimal on average over the queries and keys of each head. The mean key
        is subtracted first, as softmax is not affected by it.
        """
        rank = self.map_q.shape[-1]
        for head in range(len(self.map_q)):
            k = inputs.k[:, head]
            q_root, q_inverse = _moment_root(inputs.patch_queries[:, head])
            k_root, k_inverse = _moment_root(k - k.mean(-2, keepdim=True))
            u, s, vh = torch.linalg.svd(q_root @ k_root)
            size = s[:rank].sqrt()
            self.map_q[head].copy_(q_inverse @ u[:, :rank] * size)
            self.map_k[head].copy_(k_inverse @ vh[:rank].mT * size)


def _moment_root(x: Tensor) -> tuple[Tensor, Tensor]:
    """Square root of the second moment of rows ``[B, N, D]``, and its inverse, in float64."""
    rows = x.flatten(0, 1).double()
    values, vectors = torch.linalg.eigh(rows.mT @ rows / len(rows))
    roots = values.clamp_min(values[-1] * 1e-6 + 1e-12).sqrt()
    return vectors * roots @ vectors.mT, vectors / roots @ vectors.mT
