"""The specification of all kernels: computes every logit, then applies the pattern. Slow."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsiattn.attention.background import Summary
from sparsiattn.attention.inputs import AttentionInputs
from sparsiattn.attention.lengths import Lengths
from sparsiattn.attention.pattern import ComputedPattern, Dense, Pattern
from sparsiattn.kernels.base import Kernel
from sparsiattn.kernels.cost import CallShape
from sparsiattn.kernels.prices import Work


class Reference(Kernel):
    """Exact, differentiable and readable attention, for every pattern on every device."""

    name = "reference"
    last_resort = True  # slow, and its memory holds complete matrices of logits
    summary = "the specification: all logits, then the pattern (slow)"
    supports_computed = True

    def why_not(self, inputs: AttentionInputs, pattern: Pattern) -> list[str]:
        return []

    def work(self, inputs: AttentionInputs, pattern: Pattern) -> Work:
        call = CallShape.of(inputs)
        pairs = call.queries * call.keys
        if isinstance(pattern, ComputedPattern):
            pairs = round(pattern.pairs() or 0)
        # every step writes a matrix of logits
        moved = call.batch * call.heads * pairs * 4 * (14 if pattern.summary else 8)
        return call.attending(pairs, calls=30.0, moved=moved)

    def __call__(self, inputs: AttentionInputs, pattern: Pattern) -> Tensor:
        dtype = inputs.q.dtype
        return self._exact(_at_least_float32(inputs), pattern).to(dtype)

    def _every_key(self, inputs: AttentionInputs) -> Tensor:
        return self._exact(_at_least_float32(inputs), Dense(inputs.n_queries, inputs.n_keys))

    def _exact(self, inputs: AttentionInputs, pattern: Pattern) -> Tensor:
        if isinstance(pattern, ComputedPattern):
            return pattern.attend_with(inputs, self._every_key)
        if isinstance(pattern, Lengths) and len(pattern.lengths) > 1:
            # with a mask, NaN in one image would spread to the others (0 * NaN)
            each = zip(_images(inputs, pattern.lengths), pattern.lengths, strict=True)
            return torch.cat([self._exact(image, Dense(n, n)) for image, n in each], dim=-2)
        logits = inputs.logits()
        keep = pattern.to_mask().to(logits.device)
        allowed = inputs.allowed()
        if allowed is not None:
            keep = keep & allowed
        kept = logits.masked_fill(~keep, float("-inf"))
        rows = pattern.summary_rows()
        if rows is None or pattern.summary is None:
            return _dropout(_softmax(kept), inputs) @ inputs.v
        summary = pattern.summary
        products = inputs.q @ inputs.k.mT * inputs.scale
        weights = summary.weights(products.dtype)
        pooled = torch.einsum("bhnm,bhngm->bhng", products, _per_query(weights, summary))
        both = torch.cat([kept, pooled + rows.to(pooled.dtype).expand_as(pooled)], dim=-1)
        p = _dropout(_softmax(both), inputs)
        on_keys, on_cells = p[..., : inputs.n_keys], p[..., inputs.n_keys :]
        spread = torch.einsum("bhng,bhngm->bhnm", on_cells, _per_query(weights, summary))
        return (on_keys + spread) @ inputs.v


def _images(inputs: AttentionInputs, lengths: tuple[int, ...]) -> Iterator[AttentionInputs]:
    """Split packed images of these lengths."""
    parts = (x.split(lengths, dim=-2) for x in (inputs.q, inputs.k, inputs.v))
    bias: list[Tensor | None] = [None] * len(lengths)
    if inputs.bias is not None:
        full = inputs.bias.expand(*inputs.bias.shape[:-2], inputs.n_queries, inputs.n_keys)
        rows = enumerate(full.split(lengths, dim=-2))
        bias = [row.split(lengths, dim=-1)[i] for i, row in rows]
    for q, k, v, b in zip(*parts, bias, strict=True):
        yield inputs.replace(q=q, k=k, v=v, bias=b)


def _at_least_float32(inputs: AttentionInputs) -> AttentionInputs:
    """The inputs in float32 at least: a specification must not round."""
    dtype = torch.promote_types(inputs.q.dtype, torch.float32)
    return inputs.replace(q=inputs.q.to(dtype), k=inputs.k.to(dtype), v=inputs.v.to(dtype))


def _per_query(weights: Tensor, summary: Summary) -> Tensor:
    """Pooling weights as ``[B|1, H|1, Nq|1, G, Nk]``."""
    return weights if summary.allowed is not None else weights[None, None, None]


def _softmax(logits: Tensor) -> Tensor:
    """Softmax whose rows without any key are zero."""
    dead = (logits == float("-inf")).all(-1, keepdim=True)
    return logits.masked_fill(dead, 0.0).softmax(-1).masked_fill(dead, 0.0)


def _dropout(p: Tensor, inputs: AttentionInputs) -> Tensor:
    return F.dropout(p, inputs.dropout) if inputs.dropout else p
