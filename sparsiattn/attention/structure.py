"""`Structure`: how the tokens of one sequence map to the image, and who says so."""

from __future__ import annotations

import math
from dataclasses import dataclass

from sparsiattn.attention.geometry import Grid

GUESS = "guess"
"""Source of a structure that was guessed from the number of tokens."""
NO_PATCHES = "none of them comes from the image"
"""Source of a structure without patches, such as the queries of a decoder."""


@dataclass(frozen=True)
class Structure:
    """How the tokens of one sequence map to the image.

    The sequence is ``prefix`` tokens, then ``views`` times the tokens of one view, then ``suffix``
    tokens. A view is the patches of one image (or frame), with special tokens among them.

    Attributes:
        grid: Rows and columns of the patches of one view; ``(1, n)`` if they are not in raster
            order.
        views: Number of images or frames in the sequence.
        prefix: Number of special tokens before the first view: class tokens, registers, prompts.
        suffix: Number of special tokens after the last view.
        specials: Positions of special tokens within every view.
        raster: Whether the patches of a view are in raster order, as planners get them.
        merge: Side of the squares of patches that the host keeps together, in patches. Planners get
            the patches in raster order all the same.
        packed: Whether images have sizes of their own: several in one sequence, end to end, or each
            in a padded row. Every call has its own grid then, and ``grid`` is that of the largest
            image at patch time.
        source: Who says so: a module that makes the tokens, an adapter or the user; or `GUESS`.

    >>> str(Structure((14, 14), prefix=1, source="the adapter timm"))
    '1 prefix token, 14 x 14 patches (the adapter timm)'
    """

    grid: Grid
    views: int = 1
    prefix: int = 0
    suffix: int = 0
    specials: tuple[int, ...] = ()
    raster: bool = True
    merge: int = 1
    packed: bool = False
    source: str = GUESS

    @property
    def known(self) -> bool:
        """Whether the structure is known rather than guessed."""
        return self.source != GUESS

    @property
    def special_count(self) -> int:
        """Number of special tokens of the sequence."""
        return self.prefix + self.suffix + self.views * len(self.specials)

    @property
    def tokens(self) -> int:
        """Number of tokens of the sequence."""
        return self.special_count + self.views * math.prod(self.grid)

    @property
    def stacked_grid(self) -> Grid:
        """Rows and columns of all views stacked vertically."""
        return self.views * self.grid[0], self.grid[1]

    def __str__(self) -> str:
        sides = [*self.grid] if self.views == 1 else [self.views, *self.grid]
        size = " x ".join(map(str, sides)) if self.raster else str(math.prod(sides))
        parts = [_counted(self.prefix, "prefix token")] if self.prefix else []
        parts.append(f"{size} patches" + ("" if self.raster else " not in raster order"))
        if self.merge > 1:
            parts[-1] += f" in squares of {self.merge} x {self.merge}"
        if self.specials:
            parts.append(_counted(len(self.specials), "special token") + " in every view")
        if self.suffix:
            parts.append(_counted(self.suffix, "suffix token"))
        return f"{', '.join(parts)} ({self.source})"


def _counted(count: int, thing: str) -> str:
    return f"{count} {thing}{'' if count == 1 else 's'}"
