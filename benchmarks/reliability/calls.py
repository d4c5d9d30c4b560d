"""Every call of a kernel inside a patched model, held against the reference kernel."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from reliability.outcomes import Wrong
from sparsiattn.attention import AttentionInputs, KeyIndex, Pattern, count_of
from sparsiattn.kernels import Choice, Reference
from sparsiattn.runtime import SiteRuntime

RANKED = ("topk", "random", "local", "connectivity")


@contextmanager
def checked() -> Iterator[list[int]]:
    """Inside the block kernels that differ from the reference, or patterns that break a budget,
    raise `Wrong`; the list has one entry, how many calls were held against it."""
    real, seen = SiteRuntime.compute, [0]

    def compute(
        self: SiteRuntime, choice: Choice, inputs: AttentionInputs, pattern: Pattern
    ) -> Tensor:
        out = real(self, choice, inputs, pattern)
        if _finite(inputs):
            seen[0] += 1
            same_as_reference(out, inputs, pattern, choice.kernel.name)
            if self.strategy.name in RANKED and isinstance(pattern, KeyIndex):
                within_budget(self.strategy, inputs, pattern)
        return out

    SiteRuntime.compute = compute  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        SiteRuntime.compute = real  # type: ignore[method-assign]


def _finite(inputs: AttentionInputs) -> bool:
    return all(bool(x.isfinite().all()) for x in (inputs.q, inputs.k, inputs.v))


def same_as_reference(out: Tensor, inputs: AttentionInputs, pattern: Pattern, name: str) -> None:
    exact = Reference()(inputs, pattern)
    if out.shape != exact.shape or out.dtype != exact.dtype:
        raise Wrong(f"{name} gives {out.shape} {out.dtype}, the reference {exact.shape}")
    if not out.numel():
        return
    bad = (out.double() - exact.double()).abs().max()
    if not bad <= bound(inputs):
        raise Wrong(f"{name} is off the reference by {bad:.2e} in {type(pattern).__name__}")


def bound(inputs: AttentionInputs) -> float:
    """How far rounding alone may move an output: a logit is known to eps times its size, a weight
    therefore to that share of itself, and values add up with weights that sum to one."""
    q, k, v = (x.double() for x in (inputs.q, inputs.k, inputs.v))
    size = float(q.norm(dim=-1).max() * k.norm(dim=-1).max()) * inputs.scale
    bias = inputs.bias
    if bias is not None and bias.dtype != torch.bool:
        finite = bias[bias.isfinite()].abs()
        size += float(finite.max()) if finite.numel() else 0.0
    return 16 * torch.finfo(inputs.q.dtype).eps * (1 + size) * float(v.abs().max())


def within_budget(strategy: Any, inputs: AttentionInputs, pattern: KeyIndex) -> None:
    """Each row has as many different keys as the budget says, prefix keys among them."""
    wanted = count_of(strategy.k, inputs.n_keys)
    index = pattern.index.sort(dim=-1).values
    if index.shape[-1] != wanted:
        raise Wrong(f"{index.shape[-1]} keys for k={strategy.k} of {inputs.n_keys}")
    if wanted > 1 and bool((index.diff(dim=-1) == 0).any()):
        raise Wrong("a row has one key twice")
    prefix = min(inputs.prefix, wanted) if strategy.prefix_keys else 0
    if prefix and bool((index[..., :prefix] >= inputs.prefix).any()):
        raise Wrong("a prefix key is missing")
    if strategy.name == "topk" and inputs.tiles is None and inputs.bias is None:
        _are_the_best(strategy, inputs, pattern)


def _are_the_best(strategy: Any, inputs: AttentionInputs, pattern: KeyIndex) -> None:
    """No key that was left out has a larger logit than one that was chosen."""
    rows = inputs.logits()[..., inputs.prefix :, :].float()
    chosen = torch.zeros_like(rows, dtype=torch.bool).scatter(-1, pattern.index, True)
    forced = torch.arange(inputs.n_keys) < (inputs.prefix if strategy.prefix_keys else 0)
    least = rows.masked_fill(~chosen | forced, float("inf")).amin(-1)
    most = rows.masked_fill(chosen | forced, float("-inf")).amax(-1)
    slack = 16 * torch.finfo(inputs.q.dtype).eps * (1 + rows.abs().amax(-1))
    if bool((most > least + slack).any()):
        raise Wrong("topk left out a key with a larger logit")
