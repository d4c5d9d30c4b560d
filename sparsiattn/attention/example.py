"""The input that a model is called with in a dry run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, eq=False)
class Example:
    """One image, or the other inputs that a model takes.

    Attributes:
        shape: Shape of one image, ``(1, C, H, W)``; without an image, of the first tensor.
        arguments: Positional and keyword arguments; None where there is only an image, and the
            adapter knows how to call the model with it.
        image: The image itself, if the user gave one.
        with_values: Whether the model reads values, so that a dry run on meta tensors would fail.
    """

    shape: tuple[int, ...]
    arguments: tuple[tuple[Any, ...], dict[str, Any]] | None = None
    image: Any = None
    with_values: bool = False
