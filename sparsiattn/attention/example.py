"""What a model is called with in a dry run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, eq=False)
class Example:
    """One image, or whatever else a model takes.

    Attributes:
        shape: Of one image, ``(1, C, H, W)``, or of the first tensor where there is no image.
        arguments: Positional and keyword arguments; None where there is only an image, and the
            adapter knows how to call the model with it.
        image: The image itself, where the user gave one.
        with_values: Whether the model runs only with values, so that dry runs have them, too.
    """

    shape: tuple[int, ...]
    arguments: tuple[tuple[Any, ...], dict[str, Any]] | None = None
    image: Any = None
    with_values: bool = False
