"""The work of choosing the keys of a call, from the pattern that a planner returns."""

from __future__ import annotations

import math

from sparsiattn.attention.factored_bias import FactoredBias
from sparsiattn.attention.inputs import AttentionInputs
from sparsiattn.attention.pattern import Pattern, Ranked
from sparsiattn.attention.top_logits import TopLogits
from sparsiattn.kernels import triton_plan
from sparsiattn.kernels.compiled import is_loaded
from sparsiattn.kernels.cost import CallShape, Planning, planning
from sparsiattn.kernels.gpu_prices import OPERATOR_CALLS
from sparsiattn.kernels.prices import COMPILED_TYPES

# Time of compiled code for one vote, and for the host's bias of one pair, relative to torch's time
# for one score to choose from: 1.6e-9 and 0.8e-9 s of 1.3e-8 s, at 1,024 to 4,096 tokens on a Xeon
# with AVX-512 under other load. Both are accurate to a factor of about 1.5. `tune` measures votes,
# so its price of planning corrects a wrong VOTE_WORTH, but not a wrong BIAS_WORTH.
VOTE_WORTH, BIAS_WORTH = 0.125, 0.06

# Kernels that planning by votes launches on a GPU: by torch, counted by
# `tests/kernels/test_launches.py`, and in one operator with two launches.
_TORCH_CALLS, _TRITON_CALLS = 12.0, OPERATOR_CALLS + 2


def _width(inputs: AttentionInputs) -> int:
    """How many numbers the bias of one query consists of."""
    bias = inputs.bias
    return sum(bias.sides) if isinstance(bias, FactoredBias) else inputs.n_keys


def planning_of(pattern: Pattern, macs: int, inputs: AttentionInputs) -> Planning:
    """The work of choosing the keys of one call, from the planner's pattern and its MACs."""
    scores = pattern.scores.numel() if isinstance(pattern, Ranked) else 0
    if not (isinstance(pattern, TopLogits) and macs):  # without MACs, the kernel chooses
        return planning(macs, scores, CallShape.of(inputs))
    scores, calls = pattern.score_count, None
    compiled = pattern.votes and inputs.q.dtype in COMPILED_TYPES
    if inputs.device.type == "cuda":
        in_triton = compiled and inputs.bias is None and triton_plan.is_planned_on(inputs.device)
        scores = round(VOTE_WORTH * scores) if in_triton else scores
        calls = _TRITON_CALLS if in_triton else _TORCH_CALLS
    elif compiled and is_loaded():
        # compiled code copies nothing, but reads the host's bias for every query
        bias = 0 if inputs.bias is None else math.prod(inputs.q.shape[:3]) * _width(inputs)
        scores = round(VOTE_WORTH * scores + BIAS_WORTH * bias)
    return planning(macs, scores, CallShape.of(inputs), calls)
