"""Keep rates that shrink while a model trains (EViT, arXiv 2202.07800, section 4)."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from sparsiattn.errors import InvalidOption
from sparsiattn.handle import Patch
from sparsiattn.patching import patch
from sparsiattn.tokens import TokenStrategy
from sparsiattn.training.trainable import has_planners


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
    if not isinstance(strategy, TokenStrategy) or has_planners(live.model):
        raise InvalidOption(
            f"keep_epochs re-patches between epochs, which only token strategies without learned "
            f"weights survive, and this model carries {strategy.name!r}: leave keep_epochs out"
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
    """The model patched with another strategy of its kind."""
    if live.strategy == strategy:
        return live
    example = None if live.follows_model else live.input_shape
    live.unpatch()
    return patch(live.model, strategy, kernel=live.kernel, input=example)
