"""The kernel, which computes attention under a pattern."""

from __future__ import annotations

import torch
from sparsiattn import AttentionInputs, Kernel, Pattern
from torch import Tensor


class NearestKeysSoftmax(Kernel):
    """All scores in plain torch, then a softmax over the pairs that the pattern keeps."""

    name = "nearest_keys_softmax"

    def why_not(self, inputs: AttentionInputs, pattern: Pattern) -> list[str]:
        reasons = []
        if inputs.dropout:
            reasons.append("no dropout")
        if pattern.summary is not None:
            reasons.append("no background: dropped keys are not pooled")
        if inputs.q.dtype not in (torch.float32, torch.float64):
            reasons.append(f"float32 or float64 only, got {inputs.q.dtype}")
        return reasons

    def speed(self, inputs: AttentionInputs, pattern: Pattern) -> float:
        return 0.5  # relative to dense attention: `auto` takes it only if nothing faster works

    def __call__(self, inputs: AttentionInputs, pattern: Pattern) -> Tensor:
        keep = pattern.to_mask()
        scores = inputs.logits().masked_fill(~keep, float("-inf"))
        # rows without a key are zero, without NaN in their gradient
        empty = (scores == float("-inf")).all(-1, keepdim=True)
        weights = scores.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)
        return weights @ inputs.v
