"""How a forward pass is counted: sites and blocks tell the meter of their thread what they do."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

from sparsiattn.runtime import settings

T = TypeVar("T")


def metered(method: Callable[..., T]) -> Callable[..., T]:
    """A method of a block that chooses tokens; the meter of this thread counts it as planning."""

    @wraps(method)
    def call(self: Any, *args: Any) -> T:
        meter = settings.meter
        if meter is None:
            return method(self, *args)
        with meter.choosing(self):
            return method(self, *args)

    return call
