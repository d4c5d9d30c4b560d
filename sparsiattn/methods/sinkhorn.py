"""Sinkhorn token merging: optimal transport assigns the tokens to learned centres.

As compared in "Which Tokens to Use?" (ICCVW 2023, arXiv 2308.04657).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsiattn import Site
from sparsiattn.methods._options import check_count, check_number
from sparsiattn.methods._soft import SoftMerger, SoftPlanner
from sparsiattn.methods._weights import generator


@dataclass(frozen=True)
class Sinkhorn(SoftMerger):
    """Tokens are assigned to learned centres by entropic optimal transport with equal shares, and a
    new token is the weighted mean of the tokens of its centre.

    Args:
        keep: Share or count of tokens after each layer, see `SoftMerger`.
        epsilon: Strength of the entropy term.
        iterations: Number of iterations of Sinkhorn's algorithm, in the log domain.

    >>> Sinkhorn(keep=16, iterations=5).iterations
    5
    """

    name = "sinkhorn"
    paper = "https://arxiv.org/abs/2308.04657"
    fidelity = (
        "inspired by: transport as in the published code, but a new token is the mean of the "
        "original tokens, not the sum of unit tokens, which does not fit a pretrained block"
    )

    epsilon: float = 1.0
    iterations: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("epsilon", self.epsilon, 1e-6, 1e6)  # cosines divided by less overflow
        check_count("iterations", self.iterations)

    def planner(self, site: Site, width: int) -> Transport:
        return Transport(self.count(), width, site.name, self.epsilon, self.iterations)


class Transport(SoftPlanner):
    """The transport plan between tokens and centres, by their cosine."""

    def __init__(self, count: int, width: int, name: str, epsilon: float, iterations: int) -> None:
        super().__init__()
        self.epsilon, self.iterations = epsilon, iterations
        centres = torch.randn(count, width, generator=generator(name))
        self.centres = nn.Parameter(F.normalize(centres, dim=-1))

    def weights(self, x: Tensor) -> Tensor:
        centres = F.normalize(self.centres.float(), dim=-1)
        cosine = centres @ F.normalize(x.float(), dim=-1).mT
        plan = sinkhorn(cosine / self.epsilon, self.iterations).exp()
        return plan / plan.sum(-1, keepdim=True)


def sinkhorn(logits: Tensor, iterations: int) -> Tensor:
    """Log of the transport plan, ``[B, m, n]``, for logits of the same shape.

    Each iteration scales rows, then columns, so that the shares of each token sum to one.

    >>> sinkhorn(torch.zeros(1, 2, 4), 1).exp().sum(1)
    tensor([[1., 1., 1., 1.]])
    """
    for _ in range(iterations):
        logits = logits.log_softmax(dim=-1).log_softmax(dim=-2)
    return logits
