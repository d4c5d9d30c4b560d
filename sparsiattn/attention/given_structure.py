"""`GivenStructure`: the layout of a model's sequences, as the user gives it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from sparsiattn.attention import geometry
from sparsiattn.attention.structure import GUESS, Structure
from sparsiattn.errors import InvalidOption, InvalidType

USER = "given by the user"


@dataclass(frozen=True)
class GivenStructure:
    """The layout of a model's sequences, as the user gives it to `patch`. None means not given.

    Attributes:
        grid: ``(rows, columns)`` or ``(views, rows, columns)``.
        prefix: Number of special tokens before the patches.
        suffix: Number of special tokens after the patches.
        specials: How many special tokens start every view, or their positions within a view.
    """

    grid: tuple[int, ...] | None = None
    prefix: int | None = None
    suffix: int | None = None
    specials: int | tuple[int, ...] | None = None

    @classmethod
    def read(cls, grid: Any, prefix: Any, suffix: Any, specials: Any) -> GivenStructure | None:
        """Check the four arguments of `patch`; None if none was given.

        Raises:
            InvalidType: An argument has the wrong type or form.
        """
        if all(value is None for value in (grid, prefix, suffix, specials)):
            return None
        sides = None if grid is None else _sizes("grid", grid)
        if sides is not None and (len(sides) not in (2, 3) or 0 in sides):
            raise InvalidType(
                f"grid must be (rows, columns) or (views, rows, columns), each >= 1, got {grid!r}"
            )
        for name, count in (("prefix", prefix), ("suffix", suffix)):
            if count is not None and not _is_count(count):
                raise InvalidType(f"{name} must be a number of tokens, got {count!r}")
        if specials is not None and not _is_count(specials):
            specials = tuple(sorted(set(_sizes("specials", specials))))
        return cls(sides, prefix, suffix, specials)

    def applied(self, known: Structure, tokens: int, site: str) -> Structure:
        """The structure of a sequence, with the user's values in place of the known ones.

        Args:
            known: The structure that was found (or guessed) without the user's values.
            tokens: Length of the sequence.
            site: Name of the site, for errors.

        Raises:
            InvalidOption: The parts do not add up to ``tokens``, or every call has its own.
        """
        if known.packed:
            raise InvalidOption(
                f"{self} cannot hold for site {site!r}, whose sequences are of several images: "
                f"their sizes are read in every call ({known}); leave it out"
            )
        views, *grid = (1, *self.grid)[-3:] if self.grid else (known.views, *known.grid)
        specials = known.specials if self.specials is None else self.specials
        structure = Structure(
            (grid[0], grid[1]),
            views,
            known.prefix if self.prefix is None else self.prefix,
            known.suffix if self.suffix is None else self.suffix,
            tuple(range(specials)) if isinstance(specials, int) else specials,
            raster=known.raster or self.grid is not None,
            source=USER if known.known or self.grid is not None else GUESS,
        )
        if self.grid is None and not known.known:
            structure = _with_guessed_grid(structure, tokens)
        if structure.tokens != tokens:
            raise InvalidOption(
                f"{self} gives {structure.tokens} tokens ({structure}), but site {site!r} has "
                f"{tokens}, found as {known}: grid, prefix, suffix and specials must add up to that"
            )
        return structure

    def __str__(self) -> str:
        names = ("grid", "prefix", "suffix", "specials")
        options = [f"{n}={getattr(self, n)}" for n in names if getattr(self, n) is not None]
        return ", ".join(options)

    def to_dict(self) -> dict[str, Any]:
        """JSON form: the arguments that were given."""
        names = ("grid", "prefix", "suffix", "specials")
        return {n: getattr(self, n) for n in names if getattr(self, n) is not None}


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0


def _sizes(name: str, value: Any) -> tuple[int, ...]:
    sizes = tuple(value) if isinstance(value, (tuple, list)) else ()
    if not sizes or not all(_is_count(size) for size in sizes):
        raise InvalidType(f"{name} must be a tuple of ints >= 0, got {value!r}")
    return sizes


def _with_guessed_grid(structure: Structure, tokens: int) -> Structure:
    """The structure with a grid guessed from the number of patches."""
    patches = tokens - structure.special_count
    if patches < 1 or patches % structure.views:
        return structure
    return replace(structure, grid=geometry.infer_grid(patches // structure.views))
