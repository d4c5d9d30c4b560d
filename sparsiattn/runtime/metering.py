"""Counting of a forward pass: sites and blocks report their work to the meter of their thread."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

from sparsiattn.runtime import settings

T = TypeVar("T")


def metered(method: Callable[..., T]) -> Callable[..., T]:
    """Decorator of a block's method that chooses tokens: the meter counts it as planning."""

    @wraps(method)
    def call(self: Any, *args: Any) -> T:
        meter = settings.meter
        if meter is None:
            return method(self, *args)
        with meter.choosing(self):
            return method(self, *args)

    return call
