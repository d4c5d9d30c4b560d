"""DynamicViT's keep predictor (NeurIPS 2021, arXiv 2106.02034, section 3.2)."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsiattn.strategies.base import spawn
from sparsiattn.strategies.reduction import Policy, Reduction
from sparsiattn.strategies.token_base import LearnedTokenPlanner, TokenInputs


class KeepPredictor(LearnedTokenPlanner):
    """Predicts for every patch token whether to keep it, from the token and the mean of kept ones.

    In eval mode the tokens with the highest keep probability are kept. In training mode none is
    dropped: straight-through Gumbel-softmax draws a policy of ones and zeros, whose gradient
    reaches these weights through the attention of all later blocks.
    `sparsiattn.training.keep_ratio_loss` makes its mean the share to be kept.

    Args:
        select: Turns keep probabilities ``[B, n]`` into a `Reduction`.
        width: Width of the tokens, C.
        name: Name of the site, which seeds the initial weights.
        keep: The budget.

    Attributes:
        share: ``[B]``, the share of tokens that the last training forward pass kept, with
            gradient.
    """

    def __init__(
        self, select: Callable[[Tensor], Reduction | None], width: int, name: str, keep: Any
    ) -> None:
        super().__init__()
        self.select, self.keep = select, keep
        half, quarter = max(1, width // 2), max(1, width // 4)
        with torch.random.fork_rng(devices=[]):  # leaves the caller's random state unchanged
            self.embed = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU())
            self.decide = nn.Sequential(
                *(nn.Linear(width, half), nn.GELU()),
                *(nn.Linear(half, quarter), nn.GELU()),
                *(nn.Linear(quarter, 2), nn.LogSoftmax(dim=-1)),
            )
        _draw(self, zlib.crc32(name.encode()))
        self.share: Tensor | None = None

    def __getstate__(self) -> dict[str, object]:
        # `share` is part of an autograd graph, which can be neither copied nor pickled
        return {**self.__dict__, "share": None}

    def forward(self, tokens: TokenInputs) -> Reduction | None:
        earlier = tokens.policy
        log_keep = self.log_probabilities(tokens.x, earlier)
        if not self.training:
            # half precision has too few values to rank tokens; float64 is kept
            precise = torch.promote_types(log_keep.dtype, torch.float32)
            return self.select(log_keep[..., 0].to(precise).exp())
        policy = F.gumbel_softmax(log_keep.float(), hard=True)[..., 0]  # half precision overflows
        if earlier is not None:
            policy = policy * earlier
        self.share = policy.mean(1)
        return Policy(policy)

    def log_probabilities(self, x: Tensor, policy: Tensor | None = None) -> Tensor:
        """Log probabilities of keeping and of dropping, ``[B, n, 2]`` (equations 3 to 6).

        Args:
            x: Tokens ``[B, n, C]``.
            policy: ``[B, n]``, 1 for tokens that earlier predictors keep; None if all are kept.
        """
        z = self.embed(x)
        local, shared = z.split((z.shape[-1] - z.shape[-1] // 2, z.shape[-1] // 2), dim=-1)
        weight = torch.ones_like(z[..., :1]) if policy is None else policy[..., None].to(z.dtype)
        mean = (shared * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True).clamp_min(1.0)
        log_keep: Tensor = self.decide(torch.cat([local, mean.expand_as(shared)], dim=-1))
        return log_keep


def _draw(module: nn.Module, seed: int) -> None:
    """Draw initial weights from a private generator, the same ones for the same site."""
    generator = spawn(seed)
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.trunc_normal_(part.weight, std=0.02, generator=generator)
            nn.init.zeros_(part.bias)
