"""Token slimming: a small network scores tokens, and each new token is a softmax mean of all.

It is a module of the Self-slimmed Vision Transformer (SiT; ECCV 2022, arXiv 2111.12624).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparsiattn import Site
from sparsiattn.methods._options import check_number
from sparsiattn.methods._soft import SoftMerger, SoftPlanner
from sparsiattn.methods._weights import generator, linear


@dataclass(frozen=True)
class SiT(SoftMerger):
    """A small MLP scores every token for every slot; each slot is a softmax mean over all tokens.

    Args:
        keep: Share or count of tokens after each layer, see `SoftMerger`.
        hidden: Hidden channels of the MLP, as a multiple of the tokens' channels.

    >>> SiT(keep=0.5).to_dict()["options"]["keep"]
    0.5
    """

    name = "sit"
    paper = "https://arxiv.org/abs/2111.12624"
    fidelity = (
        "as published code, slimming module only; the reverse module and the feature distillation "
        "that trains it are left out, and dense consumers get the transposed weights"
    )

    hidden: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("hidden", self.hidden, 0, 16, above=True)

    def planner(self, site: Site, width: int) -> Slimming:
        return Slimming(self.count(), width, max(1, int(width * self.hidden)), site.name)


class Slimming(SoftPlanner):
    """``softmax_n(scale * MLP(LN(x)))^T x``, section 3.1."""

    def __init__(self, count: int, width: int, hidden: int, name: str) -> None:
        super().__init__()
        random = generator(name)
        first, last = linear(width, hidden, random), linear(hidden, count, random)
        self.score = nn.Sequential(nn.LayerNorm(width), first, nn.GELU(), last)
        self.scale = nn.Parameter(torch.ones(1))

    def weights(self, x: Tensor) -> Tensor:
        logits: Tensor = self.scale * self.score(x)
        return logits.float().softmax(dim=1).mT
