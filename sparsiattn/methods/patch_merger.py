"""PatchMerger: learned queries attend to the tokens, and each makes one new token.

Learning to Merge Tokens in Vision Transformers, arXiv 2202.12015.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparsiattn import Site
from sparsiattn.methods._soft import SoftMerger, SoftPlanner
from sparsiattn.methods._weights import generator


@dataclass(frozen=True)
class PatchMerger(SoftMerger):
    """Learned queries attend to the normalised tokens; each makes one new token.

    Args:
        keep: Share or count of tokens after each layer, see `SoftMerger`.

    >>> PatchMerger(keep=8, layers=[5]).layers_in(12)
    (5,)
    """

    name = "patch_merger"
    paper = "https://arxiv.org/abs/2202.12015"
    fidelity = (
        "inspired by: scores use normalised tokens as published, but unnormalised tokens are "
        "mixed, so that the model's residual stream keeps its scale; prefix tokens are not merged"
    )

    def planner(self, site: Site, width: int) -> Merger:
        return Merger(self.count(), width, site.name)


class Merger(SoftPlanner):
    """``softmax_n(Q LN(x)^T / sqrt(C)) x``, section 3."""

    def __init__(self, count: int, width: int, name: str) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.queries = nn.Parameter(torch.randn(count, width, generator=generator(name)))

    def weights(self, x: Tensor) -> Tensor:
        logits: Tensor = self.queries @ self.norm(x).mT * x.shape[-1] ** -0.5
        return logits.float().softmax(dim=-1)
