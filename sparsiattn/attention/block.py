"""`Block`: one transformer block, and where its sequence can be made shorter."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tail:
    """The end ``x + f(x)`` of a block, by module paths.

    Attributes:
        entry: The module that takes x.
        exit: The module that returns f(x).
        mixes: A module in between that mixes tokens (a convolution) or tells them by their place,
            so that it needs them all.
        shape: Shape of x for one image; None if not known.
        eval_only: What is different in training mode; None if nothing is.
        factor: Name of the block's own weight by which it scales f(x); None if it does not.
    """

    entry: str
    exit: str
    mixes: str | None = None
    shape: torch.Size | None = None
    eval_only: str | None = None
    factor: str | None = None

    @property
    def ends(self) -> tuple[str, str, str | None]:
        """Where the branch begins and ends, and its scale."""
        return self.entry, self.exit, self.factor


@dataclass(frozen=True)
class Block:
    """One block of a model.

    Attributes:
        name: Module path.
        input_shape: Shape of its input for one image.
        output_shape: Shape of its output for one image.
        sites: Paths of the attention modules in it.
        tail: Its MLP branch; None if it has none of its own.
        head: The first module inside that takes the block's input.
        after: Whether its input is the output of the block before.
        adds_heads: Whether tables of positions come to it as ``[B, n, D]``, without heads.
    """

    name: str
    input_shape: torch.Size
    output_shape: torch.Size
    sites: tuple[str, ...]
    tail: Tail | None
    head: str | None = None
    after: bool = True
    adds_heads: bool = False
