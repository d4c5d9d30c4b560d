"""Self-slimmed Vision Transformer's token slimming module (ECCV 2022, arXiv 2111.12624)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparsiattn import InvalidOption, Site
from sparsiattn.methods._soft import SoftMerger, SoftPlanner, generator, linear


@dataclass(frozen=True)
class SiT(SoftMerger):
    """A small MLP scores every token for every slot; each slot is a softmax mean over all tokens.

    keep: tokens after each layer, see `SoftMerger`. hidden: width of the MLP as a share of the
    tokens' width.

    >>> SiT(keep=0.5).to_dict()["options"]["keep"]
    0.5
    """

    name = "sit"
    paper = "https://arxiv.org/abs/2111.12624"
    fidelity = (
        "as published code: the slimming module alone; its reverse module and the feature "
        "distillation that trains it are left out, dense consumers get the transposed weights"
    )

    hidden: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        number = isinstance(self.hidden, (int, float)) and not isinstance(self.hidden, bool)
        if not number or not 0 < self.hidden <= 16:  # also refuses NaN
            raise InvalidOption(f"hidden must be a number in (0, 16], got {self.hidden!r}")

    def planner(self, site: Site, width: int) -> Slimming:
        return Slimming(self.count(), width, max(1, int(width * self.hidden)), site.name)


class Slimming(SoftPlanner):
    """``softmax_n(scale * MLP(LN(x)))^T x``, section 3.1."""

    def __init__(self, count: int, width: int, hidden: int, name: str) -> None:
        super().__init__()
        draws = generator(name)
        self.score = nn.Sequential(
            nn.LayerNorm(width), linear(width, hidden, draws), nn.GELU(),
            linear(hidden, count, draws),
        )  # fmt: skip
        self.scale = nn.Parameter(torch.ones(1))

    def weights(self, x: Tensor) -> Tensor:
        logits: Tensor = self.scale * self.score(x)
        return logits.float().softmax(dim=1).mT
