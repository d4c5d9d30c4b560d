"""Images with different numbers of tokens, packed into one sequence without padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sparsiattn.attention.token_state import TokenState
from sparsiattn.errors import InvalidOption


@dataclass(frozen=True, eq=False)
class PackedTokens:
    """A batch as one sequence ``[1, sum N_i, C]``.

    Attributes:
        states: The token state of each image.
        lengths: Number of tokens of each image, prefix included.
        layer: The next block, as in `TokenState`.
        sequence: The short sequence, as in `TokenState`.
        returned: The tensor that the host got after the last block, as in `TokenState`.
        last: The last value of every original token, as in `TokenState`.
    """

    states: tuple[TokenState, ...]
    lengths: tuple[int, ...]
    layer: int = 0
    sequence: Tensor | None = None
    returned: Tensor | None = None
    last: Tensor | None = None

    @property
    def owner(self) -> int:
        """Key of the patch."""
        return self.states[0].owner

    @property
    def prefix(self) -> int:
        """Number of prefix tokens of each image."""
        return self.states[0].prefix

    @property
    def reduced(self) -> bool:
        """Always True: only a reduction packs images."""
        return True

    def bare(self) -> PackedTokens:
        """The same without activations."""
        states = tuple(state.bare() for state in self.states)
        return replace(self, states=states, sequence=None, returned=None, last=None)

    def slices(self) -> list[slice]:
        """The slice of each image in the packed sequence."""
        ends = [sum(self.lengths[: i + 1]) for i in range(len(self.lengths))]
        return [slice(end - n, end) for end, n in zip(ends, self.lengths, strict=True)]

    def parts(self, x: Tensor, attention: Any) -> Iterator[tuple[TokenState, Tensor, Any]]:
        """Each image's token state, tokens ``[1, N_i, C]`` and `AttentionInputs`."""
        for i, (state, where) in enumerate(zip(self.states, self.slices(), strict=True)):
            yield state, x[:, where], None if attention is None else attention[i]

    def fit_side(self, table: Tensor) -> Tensor:
        """The table unchanged, if it has no row per patch.

        Raises:
            InvalidOption: It is a position table. Hosts split the prefix off once, not once per
                image, so a position table cannot be applied to packed images.
        """
        if self.states[0].is_side(table):
            raise InvalidOption(
                "token counts that differ between images need blocks without position tables, but "
                f"those of this model take one of shape {tuple(table.shape)} (RoPE): use a fixed "
                "keep, e.g. keep=0.7"
            )
        return table

    def source(self) -> Tensor:
        """`source` of the whole batch, ``[B, N0]``."""
        return torch.cat([source(state, 1) for state in self.states])

    def restore_sequence(self, x: Tensor, how: str) -> Tensor:
        """Every image with all its original positions, ``[B, N0, C]``."""
        rows = [state.restore_sequence(part, how) for state, part, _ in self.parts(x, None)]
        return torch.cat(rows)


def pack(parts: Sequence[tuple[TokenState, Tensor]]) -> tuple[PackedTokens, Tensor]:
    """Concatenate images ``[1, N_i, C]`` into one sequence."""
    states = tuple(state for state, _ in parts)
    lengths = tuple(x.shape[1] for _, x in parts)
    return PackedTokens(states, lengths), torch.cat([x for _, x in parts], dim=1)


def unpack(x: Tensor, packed: PackedTokens) -> Tensor:
    """The images as a batch ``[B, max N_i, C]``.

    Shorter images repeat their last token, so that a maximum over tokens stays right.
    """
    longest = max(packed.lengths)
    rows = []
    for _, part, _ in packed.parts(x, None):
        missing = longest - part.shape[1]
        if missing:
            part = torch.cat([part, part[:, -1:].expand(-1, missing, -1)], dim=1)
        rows.append(part)
    return torch.cat(rows)


def source(carried: TokenState | PackedTokens, batch: int) -> Tensor:
    """Position of every original token in the final sequence, -1 if it is gone, ``[B, N0]``."""
    if isinstance(carried, PackedTokens):
        return carried.source()
    special = carried.prefix + carried.suffix
    if not carried.steps:
        return torch.arange(special + carried.n_original).expand(batch, -1)
    assert carried.ids is not None
    patches, count = carried.source(), carried.ids.shape[1]
    places = torch.arange(special, device=patches.device).expand(len(patches), -1)
    prefix, suffix = places[:, : carried.prefix], places[:, carried.prefix :] + count
    moved = torch.where(patches >= 0, patches + carried.prefix, -1)
    return torch.cat([prefix, moved, suffix], dim=1)
