"""`Lengths`: the pattern of images with different numbers of tokens in one sequence."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsiattn.attention.inputs import AttentionInputs
from sparsiattn.attention.pattern import SizedPattern
from sparsiattn.attention.sdpa import differentiable_attention, without_plans


@dataclass(frozen=True, eq=False)
class Lengths(SizedPattern):
    """Images of different lengths in one sequence: every query sees the keys of its own image.

    Attributes:
        lengths: Tokens of each image; they add up to ``n_queries`` and to ``n_keys``.
    """

    lengths: tuple[int, ...]

    def to_mask(self) -> Tensor:
        counts = torch.tensor(self.lengths)
        image = torch.repeat_interleave(torch.arange(len(counts)), counts)
        return (image[:, None] == image)[None, None]

    def pairs(self) -> float:
        return float(sum(n * n for n in self.lengths))

    def attend(self, inputs: AttentionInputs) -> Tensor:
        if inputs.bias is not None:
            return super().attend(inputs)
        # one call for all images of the same length: no padding, and few calls
        operands = [x.split(self.lengths, dim=2) for x in (inputs.q, inputs.k, inputs.v)]
        rows: dict[int, Tensor] = {}
        for length in sorted(set(self.lengths)):
            images = [i for i, other in enumerate(self.lengths) if other == length]
            q, k, v = (torch.cat([parts[i] for i in images]) for parts in operands)
            with without_plans(q.device):
                out = differentiable_attention(q, k, v, None, inputs.dropout, scale=inputs.scale)
            rows.update(zip(images, out.split(inputs.q.shape[0]), strict=True))
        return torch.cat([rows[i] for i in range(len(self.lengths))], dim=2)
