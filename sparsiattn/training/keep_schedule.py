"""Keep rates that decrease while a model trains (EViT, arXiv 2202.07800, section 4)."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from sparsiattn.errors import InvalidOption
from sparsiattn.patching import apply
from sparsiattn.patching.handle import Patch
from sparsiattn.runtime.patch_state import set_dense
from sparsiattn.runtime.site_runtime import is_planner_key
from sparsiattn.strategies.hybrid import Hybrid
from sparsiattn.strategies.token_base import TokenStrategy


def share(epoch: int, span: tuple[int, int]) -> float:
    """Share of the tokens to drop that is still kept in an epoch: 1 before the span, 0 after it.

    >>> [round(share(epoch, (1, 3)), 2) for epoch in range(5)]
    [1.0, 1.0, 0.5, 0.0, 0.0]
    """
    start, end = span
    return 0.5 * (1 + math.cos(math.pi * min(max((epoch - start) / (end - start), 0.0), 1.0)))


def check(patch: Patch) -> None:
    """Raise `InvalidOption` for a strategy whose keep rates cannot decrease."""
    strategy = patch.strategy
    if not isinstance(strategy, (TokenStrategy, Hybrid)):
        raise InvalidOption(
            f"keep_epochs lowers the share of tokens that stay. Only token strategies have one, "
            f"and this model is patched with {strategy.name!r}: remove keep_epochs"
        )
    if not all(isinstance(keep, float) for keep in _keeps(strategy)):
        raise InvalidOption(
            f"keep_epochs needs keep as a share (a float in (0, 1]) or a list of shares, got "
            f"{getattr(strategy, 'keep', None)!r}"
        )


def _keeps(strategy: Any) -> list[Any]:
    keep = getattr(strategy, "keep", None)
    return list(keep) if isinstance(keep, (list, tuple)) else [keep]


def at_epoch(target: Any, epoch: int, span: tuple[int, int]) -> Any:
    """The strategy with the keep rates of an epoch."""
    extra = share(epoch, span)
    keeps = [keep + (1.0 - keep) * extra for keep in _keeps(target)]
    return replace(target, keep=tuple(keeps) if isinstance(target.keep, tuple) else keeps[0])


def repatch(patch: Patch, strategy: Any) -> Patch:
    """Patch the model with another strategy of the same kind, and keep its planners' weights."""
    model, kernel = patch.model, patch.kernel
    example = None if patch.follows_model else patch.attention.example
    planners = {name: value for name, value in model.state_dict().items() if is_planner_key(name)}
    dense = {runtime.site.name: runtime.dense for runtime in patch.runtimes}
    selected = [runtime.site.name for runtime in patch.runtimes if runtime.selected]
    sites = selected if isinstance(strategy, Hybrid) else "*"
    patch.unpatch()
    fresh = apply.patch_quietly(
        model,
        strategy,
        kernel=kernel,
        input=example,
        only_if_faster=False,
        sites=sites,
        cut_to_grid=True,
    )
    for runtime in fresh.runtimes:  # sites that were dense because sparse is slower stay dense
        set_dense(fresh, runtime, dense.get(runtime.site.name, False))
    model.load_state_dict(planners, strict=False)
    return fresh
