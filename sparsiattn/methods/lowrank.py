"""Guided low-rank attention, after GLMHA."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsiattn import (
    AttentionInputs,
    InvalidOption,
    LearnedPlanner,
    Pattern,
    Site,
    Strategy,
)

from . import _tables as tables


@dataclass(frozen=True)
class LowRank(Strategy):
    """Logits from r of the head's channels: ``Q E_q diag(g) (K E_k)^T`` with a guide g per image.

    rank: r as a share of the head dim or a count. guide: hidden width of the network that makes
    ``g = 2 sigmoid(MLP(mean query))`` of all heads, None for g = 1. Starts with g = 1 and a random
    orthogonal E, so it needs calibration, which begins with the best E of that rank.

    >>> LowRank(rank=16).to_dict()["options"]["guide"]
    16
    """

    name = "lowrank"
    paper = "https://arxiv.org/abs/2410.00380"
    fidelity = (
        "inspired by: the paper factors channel attention of restoration models, and its formulas "
        "could not be confirmed; here logits between tokens get guided low-rank factors, so that "
        "QK^T costs r channels, AV all"
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
        if self.guide is not None and (type(self.guide) is not int or not 0 < self.guide < 2**31):
            raise InvalidOption(
                f"guide must be None or an int >= 1 (below 2**31), got {self.guide!r}"
            )

    def planner(self, site: Site) -> LowRankPlanner:
        return LowRankPlanner(self, site)


class LowRankPlanner(LearnedPlanner):
    """The factors of one site: maps ``[H, D, r]`` of queries and keys, and the guide's network."""

    differentiable = True

    def __init__(self, strategy: LowRank, site: Site) -> None:
        super().__init__()
        dim = site.head_dim
        rank = tables.count(strategy.rank, dim)
        draw = torch.Generator().manual_seed(zlib.crc32(site.name.encode()))
        start = torch.empty(site.heads, dim, rank)
        for head in start:
            nn.init.orthogonal_(head, gain=math.sqrt(math.sqrt(dim / rank)), generator=draw)
        self.map_q = nn.Parameter(start.clone(), requires_grad=False)
        self.map_k = nn.Parameter(start.clone(), requires_grad=False)
        self.hidden: nn.Parameter | None = None
        if strategy.guide is not None:
            width = site.heads * dim
            hidden = torch.randn(width, strategy.guide, generator=draw) / math.sqrt(width)
            self.hidden = nn.Parameter(hidden, requires_grad=False)
            last = torch.zeros(strategy.guide, site.heads * rank)
            self.last = nn.Parameter(last, requires_grad=False)

    def forward(self, inputs: AttentionInputs) -> Pattern:
        q = inputs.patch_queries @ self.map_q.to(inputs.q.dtype)
        k = inputs.k @ self.map_k.to(inputs.k.dtype)
        return Pattern.computed_keys(
            inputs, k, inputs.v, q=q * self.guide(inputs), bias=tables.host_bias(inputs)
        )

    def guide(self, inputs: AttentionInputs) -> Tensor:
        """``[B, H, 1, r]``, or a one without a network."""
        if self.hidden is None:
            return inputs.q.new_ones(())
        mean = inputs.mean_query.flatten(1)
        logits = F.gelu(mean @ self.hidden.to(mean.dtype)) @ self.last.to(mean.dtype)
        gate: Tensor = logits.sigmoid().unflatten(-1, (inputs.q.shape[1], 1, -1))
        return 2 * gate

    def loss(self, inputs: AttentionInputs) -> Tensor:
        """Relative error of the output against dense attention."""
        return tables.output_loss(self(inputs), inputs)

    @torch.no_grad()
    def init_from_batch(self, inputs: AttentionInputs) -> None:
        """The maps whose products are the best of their rank to the whole ones, in the mean over
        the queries and keys of each head; keys count from their mean, which softmax ignores."""
        rank = self.map_q.shape[-1]
        for head in range(len(self.map_q)):
            k = inputs.k[:, head]
            q_root, q_back = _root(inputs.patch_queries[:, head])
            k_root, k_back = _root(k - k.mean(-2, keepdim=True))
            u, s, vh = torch.linalg.svd(q_root @ k_root)
            size = s[:rank].sqrt()
            self.map_q[head].copy_(q_back @ u[:, :rank] * size)
            self.map_k[head].copy_(k_back @ vh[:rank].mT * size)


def _root(x: Tensor) -> tuple[Tensor, Tensor]:
    """Root of the second moment of rows ``[B, N, D]`` and its inverse, ``[D, D]`` float64."""
    rows = x.flatten(0, 1).double()
    values, vectors = torch.linalg.eigh(rows.mT @ rows / len(rows))
    roots = values.clamp_min(values[-1] * 1e-6 + 1e-12).sqrt()
    return vectors * roots @ vectors.mT, vectors / roots @ vectors.mT
