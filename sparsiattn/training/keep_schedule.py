"""Keep rates that shrink while a model trains (EViT, arXiv 2202.07800, section 4)."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from sparsiattn.errors import InvalidOption
from sparsiattn.patching.apply import patch
from sparsiattn.patching.handle import Patch
from sparsiattn.strategies.hybrid import Hybrid
from sparsiattn.strategies.token_base import TokenStrategy
from sparsiattn.training.trainable import is_planner


def share(epoch: int, span: tuple[int, int]) -> float:
    """How much of what will be dropped is still kept: 1 before the span, 0 after it.

    >>> [round(share(epoch, (1, 3)), 2) for epoch in range(5)]
    [1.0, 1.0, 0.5, 0.0, 0.0]
    """
    start, end = span
    return 0.5 * (1 + math.cos(math.pi * min(max((epoch - start) / (end - start), 0.0), 1.0)))


def check(live: Patch) -> None:
    """Raise `InvalidOption` for a strategy whose keep rates cannot shrink."""
    strategy = live.strategy
    if not isinstance(strategy, (TokenStrategy, Hybrid)):
        raise InvalidOption(
            f"keep_epochs lowers the share of tokens that stay, which only token strategies have, "
            f"and this model carries {strategy.name!r}: leave keep_epochs out"
        )
    if not all(isinstance(keep, float) for keep in _keeps(strategy)):
        raise InvalidOption(
            f"keep_epochs needs keep as a share (a float in (0, 1]) or a list of shares, got "
            f"{getattr(strategy, 'keep', None)!r}"
        )


def _keeps(strategy: Any) -> list[Any]:
    keep = getattr(strategy, "keep", None)
    return list(keep) if isinstance(keep, (list, tuple)) else [keep]


def shrunk(target: Any, epoch: int, span: tuple[int, int]) -> Any:
    """The strategy with the keep rates of an epoch."""
    more = share(epoch, span)
    keeps = [keep + (1.0 - keep) * more for keep in _keeps(target)]
    return replace(target, keep=tuple(keeps) if isinstance(target.keep, tuple) else keeps[0])


def apply(live: Patch, strategy: Any) -> Patch:
    """The model patched with another strategy of its kind, its planners' weights as they were."""
    example = None if live.follows_model else live.input_shape
    before = {name: value for name, value in live.model.state_dict().items() if is_planner(name)}
    dense = {runtime.site.name: runtime.dense for runtime in live.runtimes}
    chosen = [runtime.site.name for runtime in live.runtimes if runtime.selected]
    live.unpatch()
    fresh = patch(
        live.model, strategy, kernel=live.kernel, input=example, only_if_faster=False,
        sites=chosen if isinstance(strategy, Hybrid) else "*",
    )  # fmt: skip
    for runtime in fresh.runtimes:  # where sparse attention was too slow it is not asked again
        runtime.dense = dense.get(runtime.site.name, False)
    live.model.load_state_dict(before, strict=False)
    return fresh
