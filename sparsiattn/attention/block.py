"""`Block`: one transformer block, and where its token sequence can be shortened."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tail:
    """The last residual branch ``x + f(x)`` of a block (its MLP), by module paths.

    Attributes:
        entry: Path of the module that takes x.
        exit: Path of the module that returns f(x).
        mixes: Path of a module in between that needs all tokens, because it mixes them (a
            convolution) or depends on their positions; None if there is none.
        shape: Shape of x for one image; None if not known.
        eval_only: What the branch does differently in training mode; None if nothing.
        factor: Name of the block's own parameter that scales f(x); None if there is none.
    """

    entry: str
    exit: str
    mixes: str | None = None
    shape: torch.Size | None = None
    eval_only: str | None = None
    factor: str | None = None

    @property
    def ends(self) -> tuple[str, str, str | None]:
        """``(entry, exit, factor)``: where the branch begins and ends, and its scale."""
        return self.entry, self.exit, self.factor


@dataclass(frozen=True)
class Block:
    """One block of a model.

    Attributes:
        name: Module path.
        input_shape: Shape of its input for one image.
        output_shape: Shape of its output for one image.
        sites: Paths of its attention modules.
        tail: Its MLP branch; None if it has no separate one.
        head: Path of the first module inside that takes the block's input.
        after: Whether its input is the output of the previous block.
        adds_heads: Whether position tables reach it as ``[B, n, D]``, without a head dimension.
    """

    name: str
    input_shape: torch.Size
    output_shape: torch.Size
    sites: tuple[str, ...]
    tail: Tail | None
    head: str | None = None
    after: bool = True
    adds_heads: bool = False
