"""Masked scaled-dot-product attention: computes every pair, so it never saves time."""

from __future__ import annotations

from torch import Tensor

from sparsiattn.attention.inputs import AttentionInputs
from sparsiattn.attention.key_lists import KeyBlocks, KeyLists
from sparsiattn.attention.lengths import Lengths
from sparsiattn.attention.pattern import ComputedPattern, Dense, Logits, Mask, Pattern
from sparsiattn.attention.top_logits import TopKeys
from sparsiattn.kernels.base import Kernel
from sparsiattn.kernels.cost import CallShape
from sparsiattn.kernels.prices import Work


class MaskedSDPA(Kernel):
    """torch's fused attention with the pattern's mask: differentiable everywhere, saves no time."""

    name = "sdpa"
    summary = "torch's attention under a mask (trains everywhere, saves no time)"
    supports_computed = True

    def why_not(self, inputs: AttentionInputs, pattern: Pattern) -> list[str]:
        if pattern.summary is not None and pattern.summary.per_query:
            return ["the model's mask makes summary keys differ between queries"]
        return []

    def work(self, inputs: AttentionInputs, pattern: Pattern) -> Work:
        call = CallShape.of(inputs)
        if isinstance(pattern, ComputedPattern):
            return computed_work(call, pattern)
        if isinstance(pattern, Lengths) and inputs.bias is None:
            return lengths_work(call, pattern, calls=6.0 * len(set(pattern.lengths)))
        pairs = call.queries * (call.keys + (pattern.summary.count if pattern.summary else 0))
        if isinstance(pattern, Dense):
            return call.attending(pairs)
        masks = 1 if isinstance(pattern, Lengths) else _masks(call, pattern)
        # a boolean mask, expanded from tiles to queries, then an additive one
        moved = masks * pairs * (2 + 3 * call.dtype.itemsize)
        return call.attending(pairs, calls=20.0, moved=moved)

    def __call__(self, inputs: AttentionInputs, pattern: Pattern) -> Tensor:
        return pattern.attend(inputs)


def _masks(call: CallShape, pattern: Pattern) -> int:
    """Number of different masks: images times heads, where the pattern differs between them."""
    lists: Tensor | None = None
    if isinstance(pattern, TopKeys):  # its lists are not made yet
        return call.batch * call.heads
    if isinstance(pattern, KeyLists):
        lists = pattern.chosen if isinstance(pattern, KeyBlocks) else pattern.index
    elif isinstance(pattern, Mask):
        lists = pattern.keep
    images, heads = (1, 1) if lists is None else lists.shape[:2]
    return (1 if images == 1 else call.batch) * heads


def computed_work(call: CallShape, pattern: ComputedPattern) -> Work:
    """Work of a pattern that selects no keys: only attention, as its operands exist already."""
    each = call.batch * call.heads
    pairs, macs = pattern.pairs() or 0.0, pattern.macs(call.dim, call.value_dim)
    by_hand = isinstance(pattern, Logits)  # writes a matrix of weights
    moved = each * pairs * 4 * 3 if by_hand else 0.0
    calls = 8.0 if by_hand else 4.0 if pairs else 1.0
    return Work(calls, each * macs, each * pairs, moved, each * call.queries if pairs else 0.0)


def lengths_work(call: CallShape, pattern: Lengths, calls: float) -> Work:
    """Work of attention within each packed image."""
    return call.attending(sum(n * n for n in pattern.lengths), calls=calls)
